"""A measured text: nats per token, perplexity, and how they compare with the baseline's."""

from __future__ import annotations

import math

import pytest

from sleb.records import Measured

BASELINE = Measured(nll_sum=20.0, token_count=10)


def test_nats_are_divided_by_the_tokens_they_were_summed_over() -> None:
    after = Measured(nll_sum=75.0, token_count=25)
    assert (BASELINE.nats_per_token, after.nats_per_token) == (2.0, 3.0)
    assert after.perplexity == pytest.approx(math.exp(3.0))
    assert after.rise_over(BASELINE) == 1.0
    assert after.ratio_to(BASELINE) == pytest.approx(math.e)


@pytest.mark.parametrize("nothing", [Measured(nll_sum=None, token_count=10), Measured(nll_sum=0.0, token_count=0)])
def test_without_numbers_or_text_nothing_is_known(nothing: Measured) -> None:
    assert nothing.nats_per_token is None
    assert nothing.perplexity is None
    assert nothing.rise_over(BASELINE) is None
    assert BASELINE.rise_over(nothing) is None
    assert nothing.ratio_to(BASELINE) is None
    assert BASELINE.ratio_to(nothing) is None


def test_a_perplexity_too_large_for_a_number_is_infinite_and_its_rise_is_still_a_number() -> None:
    huge = Measured(nll_sum=9000.0, token_count=10)
    assert huge.perplexity == math.inf
    assert huge.rise_over(BASELINE) == 898.0
    assert huge.ratio_to(BASELINE) is None
    assert BASELINE.ratio_to(huge) is None
