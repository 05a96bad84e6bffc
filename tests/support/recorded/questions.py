"""A task of lm-eval over questions with choices, as its arc_easy is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def multiple_choice(train: Path, test: Path) -> dict[str, Any]:
    """The settings of a task over two files of questions."""
    return {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": str(train), "test": str(test)}},
        "output_type": "multiple_choice",
        "training_split": "train",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
