"""What all records are: frozen values, the same on disk, on the screen and in a notebook."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

FORMAT_VERSION = 1
"""Version of the run folder. A folder of another version is refused, never guessed at."""

MOST = 10**15
"""No number that is asked for is larger: far above all use, and well within what files and libraries hold."""


class Record(BaseModel):
    """A value: frozen, and strict about unknown fields, so that a misspelt one is found when it is written."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class Measured(Record):
    """A sum of negative log-likelihoods in nats and the tokens it was summed over."""

    nll_sum: float | None
    """None where the predictions were not numbers."""
    token_count: Annotated[int, Field(ge=0)]

    @property
    def perplexity(self) -> float | None:
        """exp(nll_sum / token_count)."""
        if self.nll_sum is None or self.token_count == 0:
            return None
        nats = self.nll_sum / self.token_count
        return math.exp(nats) if nats < 700 else math.inf

    @property
    def no_number(self) -> bool:
        """Whether there was something to predict, and the predictions were not numbers."""
        return self.nll_sum is None
