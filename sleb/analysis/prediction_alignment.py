"""Where predictions are already decided: the paper's Figure 5, Tables 5 and 6, and the token view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sleb.errors import ModelError, NotNumbers, SlebError
from sleb.model.token_text import token_text
from sleb.records import ExitStatistics, Passage, PassageToken

if TYPE_CHECKING:
    import torch

    from sleb.model.block_stack import BlockStack


BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)  # paper, Table 6
TOP = 5

_PROBABILITY_BYTES = 16 << 20  # of one chunk of float32 logits


class GenerationUnavailable(SlebError):
    """Raised where a model cannot generate; the analysis goes on without, and says so."""


def exit_blocks(predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ideal exits of each token, int64 (T,) each, from (N, T) predictions whose last row is the final one.

    The first block that agrees with the final prediction (the paper's ideal exit, B.1), and the first from
    which all later blocks agree as well.
    """
    agrees = predictions == predictions[-1]
    first = agrees.argmax(axis=0)
    agreeing_end = np.logical_and.accumulate(agrees[::-1], axis=0).sum(axis=0)  # at least the last block
    return first, len(predictions) - agreeing_end


def exit_statistics(predictions: np.ndarray, source: str) -> ExitStatistics:
    """Agreement and ideal exits over the tokens of (N, T) predictions; `source` says which, in words."""
    num_blocks, tokens = predictions.shape
    first, settled = exit_blocks(predictions)
    first_exit = np.bincount(first, minlength=num_blocks)
    settled_exit = np.bincount(settled, minlength=num_blocks)
    return ExitStatistics(
        source=source,
        token_count=tokens,
        agreement=tuple((predictions == predictions[-1]).mean(axis=1).tolist()),
        first_exit=tuple(first_exit.tolist()),
        settled_exit=tuple(settled_exit.tolist()),
        skipped_share=skipped_shares(first_exit),
        settled_skipped_share=skipped_shares(settled_exit),
    )


def half_decided(exits: Sequence[int] | np.ndarray) -> int | None:
    """The first block by which at least half of the tokens have left; None without any. `exits` counts by block."""
    by_block = np.cumsum(exits)
    return int(np.searchsorted(by_block, by_block[-1] / 2)) if len(by_block) and by_block[-1] else None


def skipped_shares(exits: Sequence[int] | np.ndarray) -> dict[int, float]:
    """The expected share of blocks skipped by batch size, where a batch waits for its slowest token.

    `exits` counts, per block, the tokens that leave after it. A batch is drawn at random *without*
    replacement from the measured tokens: averaged over all such batches the share is an unbiased estimate for
    batches of independent tokens, while drawing with replacement would meet the same token twice and promise
    too much. Exact, not simulated: P(slowest exit <= e) = C(k, B) / C(T, B), where k of T tokens leave by e.
    Batches larger than T are left out.
    """
    by_block = np.cumsum(np.asarray(exits, dtype=np.float64))  # k: tokens that have left after each block
    num_blocks, tokens = len(by_block), int(by_block[-1])
    shares: dict[int, float] = {}
    for batch in BATCH_SIZES:
        if batch > tokens:
            break
        drawn = np.arange(batch)[:, None]
        left = np.prod(np.clip(by_block - drawn, 0.0, None) / (tokens - drawn), axis=0)  # P(slowest <= block)
        # E[N - 1 - slowest] is the sum over all blocks but the last of P(slowest <= block).
        shares[batch] = float(left[:-1].sum() / num_blocks)
    return shares


def predictions_after_blocks(
    stack: BlockStack, outputs: Sequence[torch.Tensor], ids: torch.Tensor, keep: torch.Tensor | None = None
) -> np.ndarray:
    """The most likely next token after each block, int32 (N, tokens); the first of equals, as argmax takes it.

    `outputs` are the N+1 of `stack.outputs(ids)`; tokens go row by row, only those that are True in `keep` if
    given. Raises `NotNumbers` where logits are not numbers.
    """
    import torch

    end = outputs[-1].device  # where the final norm is
    keep = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep
    kept_ids = ids[keep]
    predictions = []
    for block, output in enumerate(outputs[1:]):
        hidden = output[keep.to(output.device)].to(end)
        # max is several times faster than argmax on bfloat16, and finds the same index.
        tops = [logits.max(dim=-1) for logits in stack.logit_chunks(hidden, kept_ids)]
        if not all(bool(top.values.isfinite().all()) for top in tops):
            raise NotNumbers(f"Block {block}", str(stack.model.dtype).removeprefix("torch."))
        predictions.append(torch.cat([top.indices for top in tops]).int() if tops else kept_ids.int())
    return torch.stack([tops.cpu() for tops in predictions]).numpy()


def top_after_blocks(
    stack: BlockStack, outputs: Sequence[torch.Tensor], ids: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """The most likely next tokens and their probabilities, int32 and float32 (tokens, N, 5), for ids (1, tokens)."""
    import torch

    end = outputs[-1].device
    tops, probabilities = [], []
    for output in outputs[1:]:
        for logits in stack.logit_chunks(output[0].to(end), ids[0], _PROBABILITY_BYTES):
            first = logits.max(dim=-1, keepdim=True).indices
            logits = logits.float()
            # The first of equals comes first here too: the passage shows the prediction that was counted.
            top = logits.scatter(-1, first, torch.inf).topk(min(TOP, logits.shape[-1]), dim=-1).indices
            tops.append(top.int().cpu())
            log_probability = logits.gather(-1, top) - logits.logsumexp(dim=-1, keepdim=True)
            probabilities.append(log_probability.exp().cpu())
    shape = (len(outputs) - 1, ids.shape[1], -1)
    by_token = [torch.cat(each).view(shape).transpose(0, 1).contiguous() for each in (tops, probabilities)]
    return by_token[0].numpy(), by_token[1].numpy()


def generate(
    stack: BlockStack, prompts: torch.Tensor, new_tokens: int, tick: Callable[[], None] = lambda: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy continuations with the cache: ids (prompts, length) and which of them were generated, bool.

    A sentence ends with its end-of-sequence token; what pads it afterwards is not marked. `tick` is called
    after each token. Raises `GenerationUnavailable` where the architecture cannot generate.
    """
    import torch

    from sleb.model.generation import continued, ends_of

    try:
        ids, _ = continued(stack.model, prompts, new_tokens, stop=True, tick=tick)
    except ModelError as error:
        raise GenerationUnavailable(str(error)) from error
    ends = ends_of(stack.model)
    generated = torch.zeros_like(ids, dtype=torch.bool)
    generated[:, prompts.shape[1] :] = True
    if ends:
        ended = torch.isin(ids, torch.tensor(ends, device=ids.device)) & generated
        generated &= (ended.cumsum(dim=1) - ended.long()) == 0  # up to and with the first end
    return ids, generated


def passage_from(
    tokenizer: Any, token_ids: np.ndarray, predictions: np.ndarray, top: np.ndarray, probability: np.ndarray
) -> Passage:
    """The token view of the first tokens: their text, and what each block would have predicted next.

    `token_ids` (P,), `predictions` (N, P), `top` and `probability` (P, N, 5).
    """
    texts: dict[int, str] = {}

    def text(token: int) -> str:
        if token not in texts:
            texts[token] = token_text(tokenizer, token)
        return texts[token]

    first, settled = exit_blocks(predictions)
    return Passage(
        tokens=tuple(
            PassageToken(
                token=text(int(token_ids[index])),
                id=int(token_ids[index]),
                top=tuple(
                    tuple((text(int(token)), round(float(share), 5)) for token, share in zip(*block, strict=True))
                    for block in zip(top[index], probability[index], strict=True)
                ),
                top_ids=tuple(tuple(int(token) for token in block) for block in top[index]),
                first_exit=int(first[index]),
                settled_exit=int(settled[index]),
            )
            for index in range(len(top))
        )
    )
