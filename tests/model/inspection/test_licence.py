"""The licence that a model names, in its card or as a file; what nobody named is not guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleb.model.inspection import licence
from tests.support import gguf_files

APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"README.md": "---\nlicense: apache-2.0\ntags: [a]\n---\n# x"}, {"license": "apache-2.0"}),
        ({"README.md": "---\r\nlicense:\r\n- mit\r\n---\r\n"}, {"license": "mit"}),
        (
            {"README.md": '---\nlicense: other\nlicense_name: "llama3"\nlicense_link: LICENSE\n---\n'},
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
        ),
        ({"README.md": "# license: mit\n"}, {}),
        ({"README.md": "---\nlicense: mit <b>\n---\n"}, {}),
        ({"README.md": "---\nlicense: mit\nno end"}, {}),
        ({"README.md": "---\nx:\n  license: mit\n---\n"}, {}),
        ({"README.md": "---\na: 1\n---\n", "LICENSE": APACHE}, {"license": "apache-2.0"}),
        ({"LICENSE.txt": "MIT License\n\nCopyright"}, {"license": "mit"}),
        ({"LICENSE": "LLAMA 2 COMMUNITY LICENSE AGREEMENT"}, {"license": "other", "license_link": "LICENSE"}),
    ],
)
def test_the_licence_of_a_folder(tmp_path: Path, files: dict[str, str], expected: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
    assert licence.of_model(str(tmp_path), None) == expected


def test_the_licence_of_a_gguf_file(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "a.gguf", settings={"general.license": "apache-2.0"})
    assert licence.of_model(str(path), None) == {"license": "apache-2.0"}
    assert licence.of_model(str(gguf_files.write(tmp_path / "b.gguf")), None) == {}
    assert licence.of_model(str(tmp_path / "none.gguf"), None) == {}
