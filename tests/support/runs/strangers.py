"""Run folders that another machine wrote, with all that a stranger could put into them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sleb.records import CalibrationSpec, JobSpec, Method, Run, RunSpec
from sleb.runtime import job_folder, run_folder

SMALL = {"sequences": 2, "sequence_length": 16}


@contextmanager
def elsewhere(home: Path) -> Iterator[None]:
    """On another machine, whose home is `home`."""
    before = os.environ.get("SLEB_HOME")
    os.environ["SLEB_HOME"] = str(home)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SLEB_HOME"]
        else:
            os.environ["SLEB_HOME"] = before


def from_elsewhere(place: Path, model: Path | str, text: Path | str, *jobs: JobSpec, finished: bool = False) -> Run:
    """A run folder of another machine at `place`, with these jobs waiting; `finished`: it searches nothing."""
    spec = RunSpec(
        kind="evaluate" if finished else "search",
        given=(1,) if finished else None,
        model=str(model),
        calibration=CalibrationSpec(source=str(text), **SMALL),
        method=Method.METRIC3,
        num_remove=None if finished else 1,
        held_out=0 if finished else 1,
        analysis=False,
    )
    with elsewhere(place.with_name(f"{place.name}-home")):
        made = run_folder.create(spec, place.with_name(f"{place.name}-there"))
        for job in jobs:
            job_folder.create_job(made.run_dir, job)
    shutil.copytree(made.run_dir, place)
    return run_folder.load(place)


def with_own_code(model: Path, marker: Path) -> Path:
    """Turn a Llama's folder into a model that brings code of its own, which leaves a mark when it runs."""
    config = json.loads((model / "config.json").read_text())
    own: dict[str, Any] = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        "architectures": ["OwnModel"],
    }
    (model / "config.json").write_text(json.dumps(config | own))
    (model / "own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return model
