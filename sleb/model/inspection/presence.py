"""Whether a model exists at all, checked before a job waits for its device. Knows names and files; loads nothing.

Whether it can be used is checked by `loading`. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sleb.errors import ModelError
from sleb.records import ExportJob, JobSettings, Run, is_gguf

_HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")  # lengths as on the hub


def require_there(run: Run, job: JobSettings) -> None:
    """Raises `ModelError` where the model that a job will load is neither here nor on the hub."""
    name = (job.gguf if isinstance(job, ExportJob) else None) or run.spec.model
    if name == "demo":
        return
    if is_gguf(name):
        require_file(Path(name).expanduser())
    elif not is_path(name):
        _require_on_hub(name, (run.stack.revision if run.stack else None) or run.spec.revision)


def require_file(path: Path) -> None:
    """Raises `ModelError` where the file does not exist."""
    if not path.is_file():
        raise ModelError(f"There is no file {path}.")


def is_path(name: str) -> bool:
    """Whether a name is a folder, or can only be meant as one; a missing `a/b` is a hub name. Raises `ModelError`.

    Folders that were asked for are absolute by now (`specs.absolute`). So `a/b` is of the hub, and libraries would take
    a folder of that name in the current one for it, and run its code.
    """
    with suppress(OSError, RuntimeError):  # names no file system takes
        if Path(name).expanduser().exists():
            if _HUB_NAME.fullmatch(name) and not name.startswith("."):
                raise ModelError(
                    f"{name} names a model on the hub, and {Path(name).absolute()} would be read for it; give that "
                    "folder's absolute path if it is meant, or start in another folder."
                )
            return True
    if name.startswith((".", "/", "~", "\\")) or not _HUB_NAME.fullmatch(name):
        raise ModelError(f"There is no model folder {name[:200]!r}. Give a folder, a .gguf file, a hub name, or demo.")
    return False


def require_code_elsewhere(settings: Mapping[str, Any]) -> None:
    """Check the other repositories that a model's own code is in (`owner/name--file.Class`). Raises `ModelError`."""
    mapped = settings.get("auto_map")
    for value in mapped.values() if isinstance(mapped, Mapping) else [mapped]:
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, str) and "--" in each:
                is_path(each.partition("--")[0])


def not_there(name: str, why: str) -> ModelError:
    """The error for the name of a model that exists neither here nor on the hub."""
    return ModelError(
        f"There is no model {name[:200]!r}: neither a folder nor a .gguf file here, and the hub did not give it "
        f"({why}). Check the name, `revision` and the network."
    )


def _require_on_hub(name: str, revision: str | None) -> None:
    """Fetch the config, from the cache or the hub: a few kilobytes, which loading asks for first as well."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        hf_hub_download(name, "config.json", revision=revision)
    except GatedRepoError:  # it exists; `loading` says what to do about it
        return
    except (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError, HFValidationError) as error:
        text = str(error).strip()
        if "401" in text:  # private, perhaps
            return
        raise not_there(name, text.splitlines()[0] if text else type(error).__name__) from error
    except (OSError, ValueError, RuntimeError):  # the hub did not answer: the model may exist
        return
