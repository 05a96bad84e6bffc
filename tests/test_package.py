"""The installed package: built and installed without a network, then used away from the checkout, in a real browser."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from playwright.sync_api import expect

import sleb
from tests.support import browser
from tests.support.paths import ROOT

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input"]
SAMPLE = "sample-smollm2-135m-metric3"
SETTINGS = """
[server]
maxUploadSize = 99
headless = false
[theme.light]
textColor = "#ff0000"
primaryColor = "#ff0000"
"""


def built(source: Path, target: Path) -> Path:
    """The wheel of a folder or an sdist, by the build backend of this environment."""
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(target)]
    subprocess.run([*PIP, "wheel", *options, str(source)], check=True)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the wheel in it and this one's dependencies, but without the checkout.

    The path entry is made last: pip would find what is installed here. What path files lie in that folder is not read
    from there, so an editable install does not count.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    subprocess.run([*PIP, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    here = [each for each in sys.path if Path(each).name in ("site-packages", "dist-packages")]
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text("\n".join(here))
    return python.parent


@pytest.fixture(autouse=True)
def no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's import path is the checkout's."""
    monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.fixture(params=["empty", "another project"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, no_path: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user may be: the second one has files of all our names, and is on the import path."""
    if request.param == "another project":
        (tmp_path / "app.py").write_text("raise SystemExit('another app')")
        (tmp_path / "pages").mkdir()
        for name in ("__init__", "runs", "steps"):
            (tmp_path / "pages" / f"{name}.py").write_text("raise SystemExit('another page')")
        (tmp_path / ".streamlit").mkdir()
        for path in (tmp_path / ".streamlit" / "config.toml", tmp_path / "streamlit_config.toml"):
            path.write_text(SETTINGS)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def output_of(folder: Path, *command: object) -> str:
    """What a command says on stdout, in a folder."""
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def files_below(folder: Path) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != ".lock"
    }


def test_the_wheel_has_one_top_level_name_and_all_that_the_dashboard_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert {name.split("/")[0] for name in names} == {"sleb", f"sleb-{sleb.__version__}.dist-info"}
        config = archive.read("sleb/_dashboard/app/.streamlit/config.toml")
    assert config == (ROOT / "streamlit_config.toml").read_bytes()  # the file, not what a link says
    own = {name.removeprefix("sleb/_dashboard/") for name in names if name.startswith("sleb/_dashboard/")}
    wanted = files_below(ROOT / "app") | files_below(ROOT / "pages") | files_below(ROOT / "assets" / "sample")
    assert own == wanted | {"assets/icon.png", "assets/logo.svg"}
    assert {name for name in names if name.startswith("sleb/")} >= files_below(ROOT / "sleb")


def test_the_wheel_of_the_source_archive_is_the_same(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path], cwd=ROOT, check=True)
    archive = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(archive) as result:
        names = {name.partition("/")[2] for name in result.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "streamlit_config.toml", "tests/test_package.py"} <= names
    with zipfile.ZipFile(built(archive, tmp_path)) as again, zipfile.ZipFile(wheel) as first:
        assert {each.filename: each.CRC for each in again.infolist()} == {
            each.filename: each.CRC for each in first.infolist()
        }


def test_the_command_is_the_installed_one_and_its_other_names_stay_inside(bin_folder: Path, tmp_path: Path) -> None:
    assert output_of(tmp_path, bin_folder / "sleb", "--version") == f"sleb {sleb.__version__}"
    code = (
        "import sleb, sys, importlib.util as util\nfrom sleb.runtime import dashboard_files\n"
        "print(sleb.__file__, dashboard_files.ROOT, util.find_spec('app'), util.find_spec('pages'))"
    )
    package, root, *others = output_of(tmp_path, bin_folder / "python", "-c", code).split()
    assert Path(package).is_relative_to(bin_folder.parent)
    assert Path(root) == Path(package).parent / "_dashboard"
    assert others == ["None", "None"]


def test_samples_are_shown_and_reported_from_anywhere(bin_folder: Path, folder: Path) -> None:
    assert "Removal list: [" in output_of(folder, bin_folder / "sleb", "show", SAMPLE)
    output_of(folder, bin_folder / "sleb", "report", SAMPLE, "--out", "report.html")
    assert "SmolLM2-135M" in (folder / "report.html").read_text()


def test_the_settings_are_in_force_from_anywhere(bin_folder: Path, folder: Path) -> None:
    code = (
        "import sys\nfrom sleb.runtime import dashboard_files\n"
        "sys.argv = ['streamlit', 'run', str(dashboard_files.MAIN)]\n"
        "import streamlit\nfrom streamlit import config\nfrom streamlit.web import bootstrap\n"
        "config._main_script_path = str(dashboard_files.MAIN)\nbootstrap.load_config_options({})\n"
        "options = ('server.maxUploadSize', 'server.headless', 'server.address', 'theme.light.primaryColor')\n"
        "print(*(streamlit.get_option(each) for each in options))"
    )
    assert output_of(folder, bin_folder / "python", "-P", "-c", code).split() == ["8", "True", "localhost", "#0b6aa8"]


@browser.NEEDED
def test_all_pages_are_drawn_with_their_components_and_colours(
    bin_folder: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("home")
    command = [str(bin_folder / "sleb"), "dashboard"]
    with browser.server(home, command=command, folder=folder) as address, browser.tab(address) as tab:
        tab.open("/")
        tab.shows("Recorded sample")
        colour = tab.page.get_by_test_id("stApp").evaluate("node => getComputedStyle(node).color")
        assert colour == "rgb(27, 36, 48)"  # of the theme, #1b2430
        for name, title in (("similarity", "Similarity"), ("compare", "Compare"), ("export", "Export")):
            tab.open(f"/{name}?run={SAMPLE}")
            expect(tab.page.get_by_role("heading", name=title, exact=True)).to_be_visible()
            if name != "export":
                tab.page.locator(".js-plotly-plot .main-svg").first.wait_for()
        tab.open(f"/alignment?run={SAMPLE}")
        tab.page.locator(".token").nth(20).click()
        tab.page.locator(".about", has_text="position 20").wait_for()  # by token_view.js
        expect(tab.page.locator(".token").first).to_have_css("cursor", "pointer")  # by token_view.css
        tab.open(f"/steps?run={SAMPLE}&step=3")
        expect(tab.page.locator(".stepper .where")).to_have_text("Step 3 of 12")
        expect(tab.page.locator(".stepper .where")).to_have_css("font-weight", "600")
        tab.page.get_by_role("button", name="Copy link").click()
        tab.page.get_by_role("button", name="Cop").filter(has_not_text="Copy link").wait_for()
        tab.open(f"/evaluate?run={SAMPLE}&show=Side+by+side")
        expect(tab.page.locator(".card .text")).to_have_count(2)
        expect(tab.page.locator(".card").first).to_have_css("border-style", "solid")
        assert tab.said == []
