"""Which transformer blocks can a language model lose, what does it cost, and how sure is that?

    import sleb
    run = sleb.search("demo", remove=3)
    run.trace.removal_list

Importing this module imports no torch; the functions do when they need a model.
"""

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
