"""No file of the folder where a command starts is ever imported, whatever process of ours starts there."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

import sleb
from app.panels import forecast_process
from sleb.records import Forecast
from sleb.runtime import job_folder, run_folder
from sleb.runtime.processes import job_processes
from sleb.specs import job_spec, run_spec
from tests.support import tiny
from tests.support.command import SLEB

NAMES = (
    "app", "sleb", "torch", "json", "streamlit", "transformers", "numpy", "pages", "random", "multiprocessing",
    "sitecustomize", "usercustomize", "peft", "lm_eval", "evaluate", "gguf",
)  # fmt: skip


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with files that leave a mark when they are imported."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\nraise SystemExit(9)\n"
        )
    return folder


@pytest.fixture
def words(tiny_model: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(3000))
    size = ["--sequences=4", "--sequence-length=16", "--remove=1", "--no-analysis", "--device=cpu"]
    return ["search", str(tiny_model), f"--calibration={text}", *size]


def test_of_commands_of_several_processes_and_of_the_proof(hostile: Path, words: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    _start(hostile, [*words, "--processes=2", f"--run-dir={run_dir}"])
    _start(hostile, ["export", str(run_dir), "--format=hf", f"--out={tmp_path / 'smaller'}"])
    assert (tmp_path / "smaller" / "proof.json").is_file()
    assert not (tmp_path / "ran").exists()


def test_of_a_detached_job_and_of_the_timing_probe(
    hostile: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the dashboard starts, from a server that runs in that folder."""
    monkeypatch.chdir(hostile)
    text = words[2].partition("=")[2]
    spec = run_spec(words[1], calibration=text, sequences=2, sequence_length=16, remove=1, analysis=False)
    timing = forecast_process.begin(spec, job_spec("search", "cpu"))
    while (result := timing.poll()) is None:
        time.sleep(0.05)
    assert isinstance(result, Forecast), result
    run = run_folder.create(spec)
    assert job_processes.start(job_folder.create_job(run.run_dir, job_spec("search", "cpu"))).wait(timeout=400) == 0
    assert sleb.load(run.run_id).trace is not None
    assert not (tmp_path / "ran").exists()


def _start(folder: Path, arguments: list[str]) -> None:
    """As a user does."""
    done = subprocess.run([SLEB, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
