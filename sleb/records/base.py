"""What all records are: frozen values, the same on disk, on the screen and in a notebook."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

FORMAT_VERSION = 1
"""Version of the run folder. A folder of another version is refused, never guessed at."""

MOST = 10**15
"""The largest number in any request: far above all use, and well within what files and libraries hold."""


def finite(value: float | None) -> float | None:
    """The value where it is a number that JSON has; None where it is infinite, not a number, or None."""
    return value if value is not None and math.isfinite(value) else None


def perplexity_of(nats_per_token: float) -> float:
    """Exponential of a mean negative log-likelihood in nats, infinite where that is too large for a number."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


class Record(BaseModel):
    """A value: frozen, and strict about unknown fields, so that a misspelt one is found when it is written."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class Measured(Record):
    """A sum of negative log-likelihoods in nats and the tokens it was summed over."""

    nll_sum: float | None
    """None where the predictions were not numbers."""
    token_count: Annotated[int, Field(ge=0)]

    @property
    def nats_per_token(self) -> float | None:
        """Mean negative log-likelihood; None where predictions were not numbers, or there was nothing to predict."""
        return None if self.nll_sum is None or self.token_count == 0 else self.nll_sum / self.token_count

    @property
    def perplexity(self) -> float | None:
        """exp(nll_sum / token_count), infinite where that is too large for a number; None as in `nats_per_token`."""
        nats = self.nats_per_token
        return None if nats is None else perplexity_of(nats)

    def rise_over(self, baseline: Measured) -> float | None:
        """Nats per token above those of the baseline; None where either is unknown."""
        before, after = baseline.nats_per_token, self.nats_per_token
        return None if before is None or after is None else after - before

    def ratio_to(self, baseline: Measured) -> float | None:
        """Perplexity as a multiple of the baseline's; None where either is unknown or infinite, or the baseline's 0."""
        before, after = finite(baseline.perplexity), finite(self.perplexity)
        return None if not before or after is None else after / before

    @property
    def no_number(self) -> bool:
        """Whether there was something to predict, and the predictions were not numbers."""
        return self.nll_sum is None
