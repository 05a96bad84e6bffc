"""What the two analyses found: similarity of block outputs, and where predictions are decided."""

from __future__ import annotations

from pydantic import Field, model_validator

from sleb.records.base import Record


class ExitStatistics(Record):
    """Where predictions are already decided, over `token_count` tokens (paper, Figure 5, Tables 5 and 6)."""

    source: str
    """On which tokens: said in words."""
    token_count: int
    agreement: tuple[float, ...]
    """Per block: share of tokens whose top prediction after it equals the final one."""
    first_exit: tuple[int, ...]
    """Per block: tokens for which it is the first that agrees (the paper's ideal exit)."""
    settled_exit: tuple[int, ...]
    """Per block: tokens for which it is the one from which the prediction stays."""
    skipped_share: dict[int, float]
    """Batch size -> share of blocks an ideal first exit skips, where the batch waits for its slowest token."""
    settled_skipped_share: dict[int, float]

    @staticmethod
    def speedup(skipped_share: float) -> float:
        """1 / (1 - skipped share) (paper, B.1)."""
        return 1.0 / (1.0 - skipped_share)


class Alignment(Record):
    """Prediction alignment on the calibration tokens and on the model's own generated ones."""

    calibration: ExitStatistics
    generated: ExitStatistics | None
    generated_reason: str | None = None
    """Why there are no generated tokens, if so."""


class Similarity(Record):
    """Cosine similarity between block outputs; index 0 is the embedding output, index i + 1 is block i."""

    token_count: int
    mean: tuple[tuple[float, ...], ...]
    """(N+1) x (N+1), mean over the sampled calibration tokens."""
    mean_without_first: tuple[tuple[float, ...], ...]
    """The same without each sequence's first token, whose huge norm hides the rest."""
    random_token: tuple[tuple[float, ...], ...]
    """The paper's own: one random token fed alone (3.1, Figure 6)."""
    random_token_id: int
    metric1: tuple[float, ...]
    """Per block, 1 - mean cosine of its input and output (paper, equation 3; elsewhere called Block Influence)."""
    chunk_angular_distance: tuple[tuple[float | None, ...], ...]
    """[length - 1][start]: mean angular distance, in [0, 1], between the input and the output of a chunk."""


class PassageToken(Record):
    """One token of the passage and what each block would have predicted after it."""

    token: str
    top: tuple[tuple[tuple[str, float], ...], ...]
    """Per block: the five most likely next tokens and their probabilities. Bytes that are no text are named."""
    first_exit: int
    settled_exit: int
    id: int | None = None
    """In the vocabulary; None in what was analysed by version 0.1.0. Different tokens may have the same text."""
    top_ids: tuple[tuple[int, ...], ...] = ()
    """Of the tokens in `top`; none where `id` is None."""

    @model_validator(mode="after")
    def _known_alike(self) -> PassageToken:
        shape = [len(block) for block in self.top] if self.id is not None else []
        if [len(block) for block in self.top_ids] != shape:
            raise ValueError("the predictions of a token have one id each, or none")
        return self


class Passage(Record):
    """A short piece of the calibration text for the token view."""

    tokens: tuple[PassageToken, ...]


class AnalysisDescription(Record):
    """Which cache entry the analyses came from, and what they were made of."""

    cache_key: str
    sequences: int
    sequence_length: int
    token_count: int
    seconds: float
    cached: bool
    versions: dict[str, str] = Field(default={})
    """Of the libraries that computed the block outputs; empty in files of versions that did not say."""


class Analysis(Record):
    """Both analyses of a run, as pages draw them."""

    description: AnalysisDescription
    similarity: Similarity
    alignment: Alignment
    passage: Passage
