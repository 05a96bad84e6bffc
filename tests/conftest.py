"""What all tests share: no network, a home of their own, one thread, tiny models on disk, real text where it is."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny matrices: threads would only wait for each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # and where there are two, not by spinning on a busy machine

from pathlib import Path

import pytest
import torch

from tests.support import tiny
from tests.support.paths import SHARED

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests are shared out (`-n 2 --dist loadgroup`): files stay whole, and there is one browser at a time."""
    for item in items:
        in_browser = item.path.stem.endswith("_in_browser") or item.path.stem == "test_package"
        item.add_marker(pytest.mark.xdist_group("browser" if in_browser else str(item.path)))


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own: no test sees another's runs or cache, or the user's."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("SLEB_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def real_text() -> Path:
    """WikiText-2 raw, where the data folder is there."""
    path = SHARED / "data" / "wikitext2" / "wiki.valid.raw"
    if not path.is_file():
        pytest.skip("needs WikiText-2 raw in ../shared/data/wikitext2, which is not there")
    return path


@pytest.fixture(scope="session")
def demo_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo model and its text lie, converted once for all tests and processes."""
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if shared.name.startswith("popen-") else shared) / "demo-cache"
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture
def demo_cache(home: Path, demo_files: Path) -> None:
    """A home that has them, for tests that only use them."""
    (home / "cache").mkdir()
    (home / "cache" / "demo").symlink_to(demo_files)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with six blocks, as a folder; tests copy it before they change it."""
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some thousand characters of made-up text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.text())
    return path
