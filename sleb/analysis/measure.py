"""Both analyses and the passage from one forward pass, or from the cache without any pass.

What a run shows is made from a `BlockOutputs` alone, whether it was computed a moment ago or read from disk,
so that both ways give the same result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sleb.analysis import block_output_cache, prediction_alignment, similarity, token_sample
from sleb.errors import ModelError, NotNumbers
from sleb.model.block_stack import BlockStack
from sleb.model.out_of_memory import in_batches
from sleb.records import ANALYSIS_VERSION, Alignment, Analysis, AnalysisDescription

PROMPTS = 12  # about 1,500 generated tokens: the standard error of a share is near one per cent
PROMPT_TOKENS = 32
NEW_TOKENS = 128  # the paper generates sentences of 128 tokens (B.1)
PASSAGE_TOKENS = 48

_GENERATION_AGREES = 0.8  # share of tokens; in bfloat16 near-ties cost a few per cent
_GENERATION_COST = 0.7  # of a generated token, in sampled ones: for the progress alone

Progress = Callable[[float, str], None]


@dataclass(frozen=True, eq=False)
class Sample:
    """The calibration tokens that are analysed: whole sequences first, the last one cut."""

    pieces: tuple[np.ndarray, ...]  # int64 (sequences, length) each: the whole sequences, then the cut one
    prompts: np.ndarray  # int64 (prompts, length): heads of calibration sequences, to be continued

    @classmethod
    def of(cls, ids: np.ndarray, budget: int) -> Sample:
        """The first `budget` tokens of (S, L) ids."""
        length = ids.shape[1]
        whole, rest = divmod(min(budget, ids.size), length)
        pieces = [ids[:whole], ids[whole : whole + 1, :rest]]
        return cls(tuple(piece for piece in pieces if piece.size), ids[:PROMPTS, :PROMPT_TOKENS])

    @property
    def sequences(self) -> int:
        """Sampled sequences, the cut one included."""
        return sum(len(piece) for piece in self.pieces)

    @property
    def token_ids(self) -> np.ndarray:
        """int32 (T,), sequence by sequence."""
        return np.concatenate([piece.ravel() for piece in self.pieces]).astype(np.int32)

    @property
    def position(self) -> np.ndarray:
        """int32 (T,): index of each token in its sequence."""
        lengths = [piece.shape[1] for piece in self.pieces for _ in piece]
        return np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])

    @property
    def sequence(self) -> np.ndarray:
        """int32 (T,): index of each token's sequence in the calibration set."""
        return np.cumsum(self.position == 0, dtype=np.int32) - np.int32(1)


def analyze(
    stack: BlockStack,
    tokenizer: Any,
    ids: np.ndarray | torch.Tensor,
    *,
    model_key: str,
    dtype: str,
    model_name: str,
    home: Path,
    seed: int,
    batch_size: int | None = None,
    progress: Progress = lambda fraction, message: None,
) -> tuple[Analysis, token_sample.Tokens]:
    """Similarity, alignment and passage on at most 4,096 tokens of the calibration set `ids`, int64 (S, L).

    `model_key` distinguishes models (`StackDescription.model_key`). Returns the record, and the tokens that a run
    folder keeps. It takes one forward pass over them and a short one over generated text; none where the cache holds
    its result.
    """
    started = time.monotonic()
    calibration = np.asarray(ids.cpu() if isinstance(ids, torch.Tensor) else ids, dtype=np.int64)
    config = stack.model.config.get_text_config()
    sample = Sample.of(calibration, block_output_cache.tokens_that_fit(len(stack), config.hidden_size))
    random_token_id = _random_token(tokenizer, config.vocab_size, seed)
    key = block_output_cache.key_of(
        model=model_key,
        dtype=dtype,
        token_ids=sample.token_ids,
        position=sample.position,
        prompts=sample.prompts,
        random_token_id=random_token_id,
        sampling=[PROMPTS, PROMPT_TOKENS, NEW_TOKENS, PASSAGE_TOKENS],
        analysis_version=ANALYSIS_VERSION,
    )
    progress(0.0, "Looking for cached block outputs")
    outputs = block_output_cache.read(home, key)
    cached = outputs is not None
    if outputs is None:
        outputs = _compute(
            stack, sample, calibration.shape[1], random_token_id, model_name, dtype, batch_size, progress
        )
        progress(0.98, "Writing the block outputs to the cache")
        depends = {"model": model_key, "dtype": dtype, "analysis_version": str(ANALYSIS_VERSION)}
        block_output_cache.write(home, key, outputs, depends)
    analysis = analysis_of(outputs, tokenizer, key, cached=cached, since=started)
    progress(1.0, "Analyses read from the cache" if cached else "Analyses finished")
    return analysis, token_sample.sample(token_sample.of(outputs))


def analysis_of(
    outputs: block_output_cache.BlockOutputs,
    tokenizer: Any,
    key: str,
    *,
    cached: bool = True,
    since: float | None = None,
) -> Analysis:
    """The record of a run from a cache entry; runs no model. `since`: `time.monotonic()` when work began."""
    since = time.monotonic() if since is None else since
    of_text = f"{len(outputs.token_ids):,} tokens of the calibration text ({_count(outputs.sequences, 'sequence')})"
    generated = None
    if outputs.generated_ids.size:
        prompts = len(np.unique(outputs.generated_sequence))
        generated = prediction_alignment.exit_statistics(
            outputs.generated_predictions,
            f"{outputs.generated_ids.size:,} tokens that the model generated greedily, at most {NEW_TOKENS} "
            f"after each of {_count(prompts, 'prompt')} from the calibration text",
        )
    shown = len(outputs.passage_top)
    return Analysis(
        similarity=similarity.similarity_from(
            outputs.cosine, outputs.position, outputs.random_cosine, outputs.random_token_id
        ),
        alignment=Alignment(
            calibration=prediction_alignment.exit_statistics(outputs.predictions, of_text),
            generated=generated,
            generated_reason=outputs.generated_reason,
        ),
        passage=prediction_alignment.passage_from(
            tokenizer,
            outputs.token_ids[:shown],
            outputs.predictions[:, :shown],
            outputs.passage_top,
            outputs.passage_probability,
        ),
        description=AnalysisDescription(  # last: it says how long the rest took
            cache_key=key,
            sequences=outputs.sequences,
            sequence_length=outputs.sequence_length,
            token_count=len(outputs.token_ids),
            seconds=time.monotonic() - since,
            cached=cached,
            versions=outputs.versions,
        ),
    )


@torch.inference_mode()
def _compute(
    stack: BlockStack,
    sample: Sample,
    sequence_length: int,
    random_token_id: int,
    model_name: str,
    dtype: str,
    batch_size: int | None,
    progress: Progress,
) -> block_output_cache.BlockOutputs:
    tokens = len(sample.token_ids)
    total = tokens + (1 + _GENERATION_COST) * sample.prompts.shape[0] * NEW_TOKENS
    batch_size = batch_size or max(1, similarity.batch_tokens(stack) // sequence_length)
    alone = stack.outputs(torch.tensor([[random_token_id]], device=stack.device))
    random_outputs = np.empty((len(stack) + 1, 1, alone[0].shape[-1]), dtype=np.float32)
    _to_host(stack, alone, random_outputs, dtype)

    def sampled(done: int) -> None:
        progress(0.98 * done / total, f"Block outputs of {done:,} of {tokens:,} tokens")

    def generating(share: float, message: str) -> None:
        progress(0.98 * (tokens + share * (total - tokens)) / total, message)

    outputs, cosine, predictions = _run_sample(stack, sample, alone[0].shape[-1], dtype, batch_size, sampled)
    shown = min(PASSAGE_TOKENS, sample.pieces[0].shape[1])
    # Float32 holds every value of the model's own dtype, so that the way back is exact.
    restored = [torch.from_numpy(outputs[index, None, :shown]).to(like) for index, like in enumerate(alone)]
    head = torch.as_tensor(sample.pieces[0][:1, :shown], device=stack.device)
    passage_top, passage_probability = prediction_alignment.top_after_blocks(stack, restored, head)
    generated, reason = _generated_or_reason(stack, sample.prompts, generating)
    return block_output_cache.BlockOutputs(
        model=model_name,
        sequences=sample.sequences,
        sequence_length=sequence_length,
        outputs=outputs,
        cosine=cosine,
        predictions=predictions,
        token_ids=sample.token_ids,
        sequence=sample.sequence,
        position=sample.position,
        random_token_id=random_token_id,
        random_cosine=similarity.cosine_matrices(random_outputs)[0],
        generated_predictions=generated.predictions,
        generated_ids=generated.ids,
        generated_sequence=generated.sequence,
        generated_reason=reason,
        passage_top=passage_top,
        passage_probability=passage_probability,
        versions=_versions(),
    )


def _run_sample(
    stack: BlockStack,
    sample: Sample,
    hidden_size: int,
    dtype: str,
    batch_size: int,
    progress: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Block outputs, cosines and predictions of T sampled tokens: (N+1, T, H), (T, N+1, N+1) and (N, T).

    `progress` is called with the number of tokens that are done.
    """
    tokens, points = len(sample.token_ids), len(stack) + 1
    outputs = np.empty((points, tokens, hidden_size), dtype=np.float32)
    cosine = np.empty((tokens, points, points), dtype=np.float32)
    predictions = np.empty((len(stack), tokens), dtype=np.int32)
    offset = 0
    for piece in sample.pieces:

        def look(start: int, stop: int, piece: np.ndarray = piece, offset: int = offset) -> None:
            ids = torch.as_tensor(piece[start:stop], device=stack.device)
            here = slice(offset + start * piece.shape[1], offset + stop * piece.shape[1])
            own = stack.outputs(ids)
            _to_host(stack, own, outputs[:, here], dtype)
            cosine[here] = similarity.cosine_matrices(outputs[:, here])
            predictions[:, here] = prediction_alignment.predictions_after_blocks(stack, own, ids)
            progress(here.stop)

        batch_size = in_batches(len(piece), batch_size, look)
        offset += piece.size
    return outputs, cosine, predictions


@dataclass(frozen=True, eq=False)
class _Generated:
    """Continuations of prompts, G generated tokens in all."""

    predictions: np.ndarray  # int32 (N, G)
    ids: np.ndarray  # int32 (G,)
    sequence: np.ndarray  # int32 (G,)


def _generated_or_reason(stack: BlockStack, prompts: np.ndarray, progress: Progress) -> tuple[_Generated, str | None]:
    """What the model generates after the prompts, or nothing and the sentence that says why."""
    none = _Generated(np.empty((len(stack), 0), np.int32), np.empty(0, np.int32), np.empty(0, np.int32))
    try:
        batches = [none, *_generate(stack, prompts, progress)]
    except prediction_alignment.GenerationUnavailable as error:
        return none, str(error)
    together = _Generated(
        np.concatenate([each.predictions for each in batches], axis=1),
        np.concatenate([each.ids for each in batches]),
        np.concatenate([each.sequence for each in batches]),
    )
    return together, None


def _generate(stack: BlockStack, prompts: np.ndarray, progress: Progress) -> list[_Generated]:
    """Continue the prompts greedily; then the predictions after each block where a token was generated."""
    if stack.streamed is not None:
        raise prediction_alignment.GenerationUnavailable(
            "The model is read from disk block by block: generating would read all of it for every token."
        )
    config = stack.model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    room = NEW_TOKENS if not positions else min(NEW_TOKENS, positions - prompts.shape[1])
    if room < 1:
        raise prediction_alignment.GenerationUnavailable(
            f"The model has {positions} positions: {prompts.shape[1]} tokens leave no room to generate more."
        )
    results: list[_Generated] = []

    def proceed(start: int, stop: int) -> None:
        done, ticks = start / len(prompts), 0
        batch = (stop - start) / len(prompts)
        share = _GENERATION_COST / (1 + _GENERATION_COST)

        def tick() -> None:
            nonlocal ticks
            ticks += 1
            message = f"Generated {ticks} of {room} tokens per prompt"
            progress(done + batch * share * min(1.0, ticks / room), message)

        heads = torch.as_tensor(prompts[start:stop], device=stack.device)
        ids, generated = prediction_alignment.generate(stack, heads, room, tick)
        before = generated[:, 1:]  # a generated token is predicted at the position before it
        seen = ids[:, :-1]
        outputs = stack.outputs(seen)
        predictions = prediction_alignment.predictions_after_blocks(stack, outputs, seen, before)
        rows = torch.arange(start, stop, device=ids.device)[:, None].expand_as(before)[before]
        results.append(_Generated(predictions, _int32(ids[:, 1:][before]), _int32(rows)))
        progress(done + batch, "Predicted the generated tokens")

    in_batches(len(prompts), len(prompts), proceed)
    same = np.concatenate([each.predictions[-1] == each.ids for each in results]).mean()
    if same < _GENERATION_AGREES:
        raise prediction_alignment.GenerationUnavailable(
            f"{type(stack.model).__name__} generates with its cache what its forward pass does not predict "
            f"({same:.0%} of the tokens are the same); exits were not measured on them."
        )
    return results


def _to_host(stack: BlockStack, outputs: list[torch.Tensor], target: np.ndarray, dtype: str) -> None:
    """Copy block outputs into float32 (N+1, tokens, H) on the host; refuses what is not a number."""
    for index, output in enumerate(outputs):
        where = f"Block {index - 1}" if index else "The embedding"
        if output.ndim != 3 or output.shape[0] * output.shape[1] != target.shape[1]:
            raise ModelError(
                f"{where} of {type(stack.model).__name__} puts out {tuple(output.shape)} for "
                f"{target.shape[1]} tokens, not one hidden state for each; it cannot be analysed."
            )
        target[index] = output.flatten(0, 1).float().cpu().numpy()
        if not np.isfinite(target[index]).all():
            raise NotNumbers(where, dtype, "outputs")


def _int32(values: torch.Tensor) -> np.ndarray:
    return np.asarray(values.cpu().numpy(), dtype=np.int32)


def _random_token(tokenizer: Any, vocab_size: int, seed: int) -> int:
    """The paper's single random token (3.1), drawn among those that the tokenizer has and that are text."""
    known = min(vocab_size, len(tokenizer)) if hasattr(tokenizer, "__len__") else vocab_size
    special = set(getattr(tokenizer, "all_special_ids", ()))
    choices = np.array([token for token in range(known) if token not in special] or range(known))
    return int(np.random.default_rng(seed).choice(choices))


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("sleb", "torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "s")
