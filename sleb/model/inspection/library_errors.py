"""What libraries raise and print while they read a model's files, made readable. Knows no file itself."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sleb.errors import ModelError, SlebError, excerpt
from sleb.model.inspection.presence import not_there
from sleb.model.inspection.quantisation import Scheme

Loaded = TypeVar("Loaded")

_LONGEST_NOTE = 4000  # characters
_COLOURS = re.compile(r"\x1b\[[\d;]*m")  # as transformers writes them itself


def loaded_by(name: str, load: Callable[[], Loaded], scheme: Scheme | None = None) -> Loaded:
    """Call `load`, by which a library reads a model's files, and return its result.

    Raises `ModelError`, in one sentence, for whatever the library raises about damaged or foreign files.
    """
    quieten_libraries()
    try:
        return load()
    except SlebError:
        raise
    except Exception as error:  # any class there is: the data decides how far a library gets with it
        raise ModelError(_explain(name, error, scheme)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust; it has no class to import
            raise
        raise ModelError(_explain(name, error, scheme)) from error


def _printable(record: logging.LogRecord) -> bool:
    """Escape what transformers logs about a model: it has names in it that come from the model's files."""
    text = _COLOURS.sub("", record.getMessage())
    record.msg = "".join(char if char.isprintable() or char in "\n\t" else " " for char in text)[:_LONGEST_NOTE]
    record.args = ()
    return True


def _explain(name: str, error: BaseException, scheme: Scheme | None) -> str:
    text = str(error).strip()
    first = excerpt(text if text.split("\n")[0].endswith(":") else text.split("\n")[0]) or type(error).__name__
    if "trust_remote_code" in text:
        return f"{name} needs code of its own to run; read it, and allow it with `trust_remote_code=True`."
    if "gated" in text.lower() or "401" in text:
        return f"{name} is gated or private on the hub: accept its terms there and log in with: hf auth login."
    if "no file named model.safetensors" in text or "does not appear to have a file named" in text:
        return f"{name} has no safetensors weights that can be read: {first}"
    if scheme is not None:
        return f"{name} is quantised with {scheme.label}, which cannot be loaded here ({type(error).__name__}): {first}"
    if isinstance(error, ImportError):
        return f"{name} needs a library that is not installed: {first}"
    if isinstance(error, OSError) and not Path(name).exists() and name != "demo":
        return str(not_there(name, first))
    return f"{name} cannot be loaded ({type(error).__name__}): {first}"


def quieten_libraries() -> None:
    """Leave out the progress bars of transformers, and what its log says that no terminal should show."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    quieten_torchao()
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_printable)


def quieten_torchao() -> None:
    """Silence torchao, which transformers imports where it is installed: it warns of kernels for other machines."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
