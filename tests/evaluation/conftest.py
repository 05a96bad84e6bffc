"""What tests of several evaluations need."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sleb.scoring.scorer import Scorer


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each sweep scored, over all its lists."""
    counts: list[int] = []
    before = Scorer.score

    def score(self: Scorer, skip_sets: Any, sequences: np.ndarray) -> np.ndarray:
        counts.append(len(skip_sets) * len(sequences))
        return before(self, skip_sets, sequences)

    monkeypatch.setattr(Scorer, "score", score)
    return counts
