"""What is asked and what was found: frozen records, the same on disk, on the screen and in a notebook."""

from __future__ import annotations

from sleb.records.analysis import (
    Alignment,
    Analysis,
    AnalysisDescription,
    ExitStatistics,
    Passage,
    PassageToken,
    Similarity,
)
from sleb.records.base import FORMAT_VERSION, MOST, Measured, Record, finite, perplexity_of
from sleb.records.export import LeftBehind, Proof
from sleb.records.findings import (
    AnyFinding,
    EvaluatedText,
    Finding,
    Flip,
    Generation,
    Healing,
    Quantization,
    TaskAccuracy,
    TextPerplexity,
    Timing,
)
from sleb.records.identity import ANALYSIS_VERSION, EVALUATION_VERSION, SCORING_VERSION, ModelIdentity
from sleb.records.job import Attempt, Job, JobKind, JobSpec, JobState, JobStatus, Progress
from sleb.records.permissions import Permissions
from sleb.records.requests import (
    NAMED_TEXTS,
    Ask,
    BenchmarkSpec,
    EvaluateSpec,
    GenerateSpec,
    HealSpec,
    QuantizeSpec,
    RemovalList,
    Shape,
    sorted_list,
)
from sleb.records.run import Forecast, Run, SelfCheck, StackDescription
from sleb.records.spec import RACE_SEQUENCES, CalibrationSpec, Method, RunSpec, default_held_out
from sleb.records.trace import Baseline, Candidate, Step, Trace, steps_of_removal

__all__ = [
    "ANALYSIS_VERSION",
    "EVALUATION_VERSION",
    "FORMAT_VERSION",
    "MOST",
    "NAMED_TEXTS",
    "RACE_SEQUENCES",
    "SCORING_VERSION",
    "Alignment",
    "Analysis",
    "AnalysisDescription",
    "AnyFinding",
    "Ask",
    "Attempt",
    "Baseline",
    "BenchmarkSpec",
    "CalibrationSpec",
    "Candidate",
    "EvaluateSpec",
    "EvaluatedText",
    "ExitStatistics",
    "Finding",
    "Flip",
    "Forecast",
    "GenerateSpec",
    "Generation",
    "HealSpec",
    "Healing",
    "Job",
    "JobKind",
    "JobSpec",
    "JobState",
    "JobStatus",
    "LeftBehind",
    "Measured",
    "Method",
    "ModelIdentity",
    "Passage",
    "PassageToken",
    "Permissions",
    "Progress",
    "Proof",
    "Quantization",
    "QuantizeSpec",
    "Record",
    "RemovalList",
    "Run",
    "RunSpec",
    "SelfCheck",
    "Shape",
    "Similarity",
    "StackDescription",
    "Step",
    "TaskAccuracy",
    "TextPerplexity",
    "Timing",
    "Trace",
    "default_held_out",
    "finite",
    "perplexity_of",
    "sorted_list",
    "steps_of_removal",
]
