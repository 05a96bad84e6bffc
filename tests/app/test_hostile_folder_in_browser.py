"""The folder in which the dashboard is started is data: none of its files is imported or changes the server."""

from __future__ import annotations

import socket
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.support import browser
from tests.support.paths import ROOT

pytestmark = browser.NEEDED

SETTINGS = """
[server]
address = "0.0.0.0"
enableXsrfProtection = false
enableCORS = false
enableStaticServing = true
maxUploadSize = 99
[secrets]
files = ["secrets.toml"]
[theme]
base = "dark"
[client]
toolbarMode = "developer"
"""
SECRETS = """
SLEB_DASHBOARD_TRUST_REMOTE_CODE = "1"
SLEB_DASHBOARD_READ_ONLY = "1"
SLEB_DASHBOARD_ALLOW_PATH = "[]]"
"""
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from sleb.cli.main import main; main()"
SLEB = [sys.executable, "-P", "-c", START, str(ROOT), "dashboard"]
"""The `sleb` command of this checkout."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where files of all names lie that somebody might import or read; each says so when it is."""
    folder = tmp_path / "folder"
    for name in ("pages", ".streamlit", "static", "sitecustomize"):
        (folder / name).mkdir(parents=True)
    names = ("app", "sleb", "torch", "json", "streamlit", "sitecustomize/__init__", "pages/__init__", "pages/runs")
    for name in names:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r})\n")
    for place in (folder, folder / ".streamlit"):
        (place / "config.toml").write_text(SETTINGS)
        (place / "secrets.toml").write_text(SECRETS)
    (folder / "streamlit_config.toml").write_text(SETTINGS)
    (folder / "static" / "file.txt").write_text("a file")
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    return home


def listens(host: str, port: int) -> bool:
    with socket.socket() as connection:
        connection.settimeout(5)
        return connection.connect_ex((host, port)) == 0


def test_no_file_of_the_current_folder_is_imported_or_changes_the_server(
    folder: Path, home: Path, tmp_path: Path
) -> None:
    with (
        browser.server(home, command=SLEB, folder=folder, environment={"PYTHONPATH": ""}) as address,
        browser.tab(address) as tab,
    ):
        port = int(address.rpartition(":")[2])
        assert listens("127.0.0.1", port)
        assert not listens("127.0.0.2", port)  # which 0.0.0.0 would
        with urllib.request.urlopen(f"{address}/_stcore/health") as answer:
            assert answer.headers["Access-Control-Allow-Origin"] is None
            assert "_streamlit_xsrf" in str(answer.headers["Set-Cookie"])
        tab.open("/")
        tab.page.get_by_role("button", name="Run the demo").wait_for()  # it does more than show
        tab.shows("Recorded sample")
        assert tab.page.get_by_test_id("stApp").evaluate("node => getComputedStyle(node).color") == "rgb(27, 36, 48)"
        tab.page.get_by_text("New run", exact=True).click()
        tab.page.get_by_role("textbox", name="Model").wait_for()
        tab.open("/similarity")
        tab.page.locator(".js-plotly-plot .main-svg").first.wait_for()
        assert tab.said == []
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("way", ["an option for Streamlit", "a variable of Streamlit's"])
def test_whatever_opens_the_server_to_others_closes_its_paths(way: str, home: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    if way == "an option for Streamlit":
        started = browser.server(home, "--server.address=0.0.0.0", command=SLEB)
    else:
        started = browser.server(home, environment={"STREAMLIT_SERVER_ADDRESS": "0.0.0.0"})
    with started as address, browser.tab(address) as tab:
        assert listens("127.0.0.2", int(address.rpartition(":")[2]))
        tab.open("/")
        model = tab.page.get_by_role("textbox", name="Model")
        tab.until(tab.page.get_by_text("New run", exact=True), model)
        model.fill(str(tmp_path / "model"))
        model.press("Enter")
        tab.page.get_by_text("--allow-path DIR").first.wait_for()
        tab.page.get_by_role("button", name="Start", exact=True).wait_for(state="hidden")
