"""The results of the two analyses: similarity of block outputs, and where predictions are decided."""

from __future__ import annotations

from pydantic import Field, model_validator

from sleb.records.base import Record


class ExitStatistics(Record):
    """Where predictions are already decided, over `token_count` tokens (paper, Figure 5, Tables 5 and 6)."""

    source: str
    """The tokens that were counted, in words."""
    token_count: int
    agreement: tuple[float, ...]
    """Share of tokens whose top prediction after each block equals the final one."""
    first_exit: tuple[int, ...]
    """Tokens for which each block is the first that agrees (the paper's ideal exit)."""
    settled_exit: tuple[int, ...]
    """Tokens for which each block is the one from which the prediction stays."""
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
    """The reason why no tokens were generated, if none were."""


class Similarity(Record):
    """Cosine similarity between block outputs; index 0 is the embedding output, index i + 1 is block i."""

    token_count: int
    mean: tuple[tuple[float, ...], ...]
    """Mean over the sampled calibration tokens, (N+1) x (N+1)."""
    mean_without_first: tuple[tuple[float, ...], ...]
    """The same without each sequence's first token, whose huge norm hides the rest."""
    random_token: tuple[tuple[float, ...], ...]
    """Similarity for one random token fed alone, as in the paper (3.1, Figure 6)."""
    random_token_id: int
    metric1: tuple[float, ...]
    """One minus the mean cosine of each block's input and output (paper, equation 3; also called Block Influence)."""
    chunk_angular_distance: tuple[tuple[float | None, ...], ...]
    """Mean angular distance, in [0, 1], between input and output of a chunk, as [length - 1][start]."""


class PassageToken(Record):
    """One token of the passage, with what would be predicted after each block."""

    token: str
    top: tuple[tuple[tuple[str, float], ...], ...]
    """The five most likely next tokens after each block, with probabilities. Bytes that are not text are named."""
    first_exit: int
    settled_exit: int
    id: int | None = None
    """Index in the vocabulary; None in analyses by version 0.1.0. Different tokens may have the same text."""
    top_ids: tuple[tuple[int, ...], ...] = ()
    """Indices of the tokens in `top`; none where `id` is None."""

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
    """The cache entry that the analyses came from, and the text they were computed on."""

    cache_key: str
    sequences: int
    sequence_length: int
    token_count: int
    seconds: float
    cached: bool
    versions: dict[str, str] = Field(default={})
    """Versions of the libraries that computed the block outputs; empty in files that do not say."""


class Analysis(Record):
    """Both analyses of a run, as pages draw them."""

    description: AnalysisDescription
    similarity: Similarity
    alignment: Alignment
    passage: Passage
