"""Which transformer blocks can a language model lose, what does it cost, and how sure is that?

    import sleb
    run = sleb.search("demo", remove=3)
    run.trace.removal_list

Importing this module imports next to nothing: its names are fetched when they are used, and torch when a model is
needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sleb.api import (
        analyze,
        benchmark,
        evaluate,
        export_model,
        findings_of,
        generate,
        heal,
        load,
        quantize,
        resume,
        runs,
        search,
    )
    from sleb.errors import SlebError
    from sleb.records import Run, RunSpec, Step, Trace

__version__ = "0.1.0"
__all__ = [
    "Run",
    "RunSpec",
    "SlebError",
    "Step",
    "Trace",
    "__version__",
    "analyze",
    "benchmark",
    "evaluate",
    "export_model",
    "findings_of",
    "generate",
    "heal",
    "load",
    "quantize",
    "resume",
    "runs",
    "search",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used: importing `sleb` stays quick, and can be stopped."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sleb import api, errors, records

    for module in (api, errors, records):
        if name in vars(module):
            globals()[name] = vars(module)[name]
    return globals()[name]


def __dir__() -> list[str]:
    return __all__
