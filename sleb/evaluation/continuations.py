"""Continuations by the baseline and by removal lists, and where their predictions part.

All of them are greedy. What was generated with a cache is checked against a forward pass, which skips the blocks the
plain way: where a family's cache does not survive that, its text is generated again without one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sleb.errors import ModelError, NotNumbers, OptionError, ScoringError, WorkEnded, model_without
from sleb.evaluation.evaluated_model import Subject
from sleb.model.generation import are_numbers, continued, numbers_only, positions_of, require_resident
from sleb.model.out_of_memory import is_out_of_memory
from sleb.model.token_text import UNFINISHED, token_text
from sleb.records import Flip, GenerateJob, GenerateSpec, Generation, RemovalList
from sleb.text import chat_template

log = logging.getLogger(__name__)

_AGREES = 0.9  # share of tokens generated with a cache; near ties that rounding decides are fewer
_LOGIT_BYTES = 64 << 20  # of one chunk of float32 logits


@dataclass(frozen=True)
class _Continuation:
    """What a model generated after the prompt."""

    ids: tuple[int, ...]
    seconds: float
    cached: bool


@dataclass(frozen=True, eq=False)
class _Predictions:
    """What a model finds most likely at each place of a text but the first."""

    tokens: torch.Tensor  # int64 (length - 1,)
    probabilities: torch.Tensor  # float32 (length - 1,)


def require(job: GenerateJob) -> None:
    """Refuse what can be refused before minutes of loading. Raises `OptionError`."""
    if not job.ask.prompt.strip():
        raise OptionError("The prompt is empty; give some text to go on from with `prompt`.")


def work(subject: Subject, ask: GenerateSpec) -> None:
    """Continue the prompt with the baseline and the lists; each finding is kept as soon as it is made.

    Raises `OptionError` for a prompt that the model cannot be given, `ScoringError` where memory is too small,
    `ModelError` where the family cannot generate, and `NotNumbers` where one of these models predicts no
    numbers; of a list, once the others are done.
    """
    require_resident(subject.stack.streamed, "generating")
    prompt = _prompt_ids(subject, ask)
    try:
        _work(subject, ask.model_copy(update={"lists": ()}), ask.lists or ((),), prompt)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ScoringError(
            f"Out of memory with a prompt of {len(prompt)} tokens; lower `tokens`, or choose a smaller `dtype`."
        ) from error


def _work(subject: Subject, ask: GenerateSpec, lists: Sequence[RemovalList], prompt: list[int]) -> None:
    known = {each.removal_list: each for each in subject.known(Generation) if each.ask == ask}
    known = {each: finding for each, finding in known.items() if finding.dtype == subject.loaded.dtype}
    baseline = next(
        (_Continuation(each.baseline_ids, each.baseline_seconds, each.baseline_cached) for each in known.values()), None
    )
    before: _Predictions | None = None
    refused: NotNumbers | None = None
    for each in dict.fromkeys(lists):
        if each in known:
            subject.answer(known[each])
            continue
        started = time.perf_counter()
        baseline = baseline or _continuation(subject, (), prompt, ask.tokens)
        flips: tuple[Flip, ...] = ()
        own, text = baseline, [*prompt, *baseline.ids]
        if each:
            before = before or _predictions(subject, (), text)
            try:
                own = _continuation(subject, each, prompt, ask.tokens)
                flips = _flips(subject.tokenizer, text, before, _predictions(subject, each, text))
            except NotNumbers as error:
                refused = refused or error
                continue
        subject.keep(_generation(subject, ask, each, prompt, (baseline, own), flips, started))
    if refused is not None:
        raise refused


def _generation(
    subject: Subject,
    ask: GenerateSpec,
    removal_list: RemovalList,
    prompt: list[int],
    continuations: tuple[_Continuation, _Continuation],
    flips: tuple[Flip, ...],
    started: float,
) -> Generation:
    before, after = continuations
    pieces = [pieces_of(subject.tokenizer, [*prompt, *each.ids]) for each in continuations]
    return Generation(
        **subject.facts(removal_list, time.perf_counter() - started),
        ask=ask,
        prompt_tokens=tuple(pieces[0][: len(prompt)]),
        baseline_tokens=tuple(pieces[0][len(prompt) :]),
        tokens=tuple(pieces[1][len(prompt) :]),
        baseline_text=_plain_text(subject.tokenizer, before.ids, pieces[0][len(prompt) :]),
        text=_plain_text(subject.tokenizer, after.ids, pieces[1][len(prompt) :]),
        flips=flips,
        compared=len(prompt) + len(before.ids) - 1 if removal_list else 0,
        baseline_seconds=before.seconds,
        list_seconds=after.seconds,
        baseline_ids=before.ids,
        ids=after.ids,
        baseline_cached=before.cached,
        cached=after.cached,
    )


def _prompt_ids(subject: Subject, ask: GenerateSpec) -> list[int]:
    """The prompt as the tokenizer reads it, by its own habit about BOS. Raises `OptionError`."""
    tokenizer = subject.tokenizer
    ids = _turn_ids(tokenizer, ask.prompt) if ask.chat else list(tokenizer(ask.prompt)["input_ids"])
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:  # the prompt has it, and the tokenizer adds it
        del ids[0]
    if not ids:
        raise OptionError("The tokenizer makes no token of the prompt; give some text to go on from with `prompt`.")
    vocabulary = subject.stack.config.vocab_size
    if max(ids) >= vocabulary:
        raise ModelError(
            f"The tokenizer gives token {max(ids)}, the model knows {vocabulary}: they do not belong together."
        )
    limit = positions_of(subject.stack.config)
    if limit is not None and len(ids) + ask.tokens > limit:
        room = limit - len(ids)
        advice = f"give `tokens={room}` or less" if room > 0 else "shorten the prompt"
        raise OptionError(
            f"The prompt has {len(ids)} tokens, {ask.tokens} more are asked for, and the model has {limit} positions; "
            f"{advice}."
        )
    return ids


def _turn_ids(tokenizer: Any, prompt: str) -> list[int]:
    if not tokenizer.chat_template:
        raise OptionError("This model's tokenizer has no chat template. Leave `chat` out.")
    try:
        turn = chat_template.Conversation([{"role": "user", "content": prompt}])
        text = chat_template.rendered(tokenizer, [turn], reply=True).texts[0]
    except WorkEnded as error:
        raise OptionError(
            f"The tokenizer's chat template refuses a user's turn ({error}). Leave `chat` out."
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _continuation(subject: Subject, removal_list: RemovalList, prompt: list[int], tokens: int) -> _Continuation:
    """Generate what comes after the prompt, up to and with the model's own end-of-sequence token."""
    subject.meter.phase(f"Continuing the prompt, {subject.num_removed(removal_list)}")
    try:
        generated = _generated(subject, removal_list, prompt, tokens, cached=True)
    except ModelError as error:
        log.warning("%s It generates without a cache instead.", error)
    else:
        predicted = _predictions(subject, removal_list, [*prompt, *generated.ids]).tokens[len(prompt) - 1 :].tolist()
        same = sum(token == own for token, own in zip(generated.ids, predicted, strict=True))
        if same >= _AGREES * len(generated.ids):
            return generated
        log.warning(
            "With its cache %s generates what its forward pass does not predict (%d of %d tokens are the same), %s. "
            "It generates without a cache instead.",
            type(subject.model).__name__,
            same,
            len(generated.ids),
            subject.num_removed(removal_list),
        )
    return _generated(subject, removal_list, prompt, tokens, cached=False)


def _generated(
    subject: Subject, removal_list: RemovalList, prompt: list[int], tokens: int, *, cached: bool
) -> _Continuation:
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        subject.meter.part(count / tokens, f"token {count} of {tokens}")

    with subject.without(removal_list) as model, numbers_only(model, model_without(removal_list)):
        ids = torch.tensor([prompt], device=subject.stack.device)
        started = time.perf_counter()
        text, _ = continued(model, ids, tokens, stop=True, cached=cached, tick=tick)
        new = text[0].tolist()[len(prompt) :]  # waits for the device
        return _Continuation(tuple(new), time.perf_counter() - started, cached)


@torch.inference_mode()
def _predictions(subject: Subject, removal_list: RemovalList, text: Sequence[int]) -> _Predictions:
    """Predict a text in one forward pass, the blocks skipped the plain way. All its logits never exist at once.

    Raises `NotNumbers`.
    """
    stack = subject.stack
    ids = torch.tensor([text[:-1]], device=stack.device)
    if ids.shape[1] == 0:
        return _Predictions(torch.empty(0, dtype=torch.int64), torch.empty(0))
    nothing_undone = torch.zeros(len(stack), 1, dtype=torch.bool)
    with stack.skipping(removal_list):
        hidden = stack.last_output(ids, nothing_undone)
    predictions = _most_likely(stack.logit_chunks(hidden[0], ids[0], _LOGIT_BYTES))
    if predictions is None:
        raise NotNumbers(model_without(removal_list), subject.loaded.dtype)
    return predictions


def _most_likely(chunks: Iterator[torch.Tensor]) -> _Predictions | None:
    """The most likely tokens by the logits of a text, chunk by chunk; None where they are not numbers."""
    tokens, probabilities = [], []
    for logits in chunks:
        if not are_numbers(logits):
            return None
        top = logits.max(dim=-1).indices  # on the model's own logits, as `generate` takes it
        exact = logits.float()
        logarithm = exact.gather(-1, top[:, None])[:, 0] - exact.logsumexp(dim=-1)
        tokens.append(top.cpu())
        probabilities.append(logarithm.exp().cpu())
    return _Predictions(torch.cat(tokens), torch.cat(probabilities))


def _flips(tokenizer: Any, text: list[int], before: _Predictions, after: _Predictions) -> tuple[Flip, ...]:
    """The places where the two find another token most likely, each token as text in its place."""
    flips = []
    for index in (before.tokens != after.tokens).nonzero()[:, 0].tolist():
        context, own = text[: index + 1], (int(before.tokens[index]), int(after.tokens[index]))
        pieces = [piece_after(tokenizer, context, token) for token in own]
        if pieces[0] == pieces[1]:  # different tokens all the same
            pieces = [f"{piece} (token {token})" for piece, token in zip(pieces, own, strict=True)]
        flips.append(
            Flip(
                position=index + 1,
                before=pieces[0],
                after=pieces[1],
                before_probability=float(before.probabilities[index]),
                after_probability=float(after.probabilities[index]),
            )
        )
    return tuple(flips)


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it, special tokens included; together they are the whole text.

    Of a character in several tokens the last one has it, the others are empty.
    """
    pieces: list[str] = []
    start = done = 0  # the text from `start` on is decoded with each token; up to `done` it is written
    for end in range(1, len(ids) + 1):
        old, new = _decoded(tokenizer, ids[start:done]), _decoded(tokenizer, ids[start:end])
        is_last = end == len(ids)
        if len(new) > len(old) and (is_last or not new.endswith(UNFINISHED)):
            pieces.append(new[len(old) :])
            start, done = done, end
        else:
            pieces.append("")
    return pieces


def piece_after(tokenizer: Any, context: Sequence[int], token: int) -> str:
    """The text one token adds to a text; its bytes where they are not text yet, its name where it adds none at all."""
    near = context[-8:]
    old, new = _decoded(tokenizer, near), _decoded(tokenizer, [*near, token])
    while not new.startswith(old):
        old = old[:-1]  # half a character that has become a whole one
    piece = new[len(old) :]
    if piece and UNFINISHED not in piece:
        return piece
    own = token_text(tokenizer, token)
    return own or str(
        tokenizer.convert_ids_to_tokens(token) or f"<{token}>"
    )  # the model's vocabulary may be larger than the tokenizer's


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _plain_text(tokenizer: Any, ids: Sequence[int], pieces: Sequence[str]) -> str:
    special = set(getattr(tokenizer, "all_special_ids", ()))
    return "".join(piece for token, piece in zip(ids, pieces, strict=True) if token not in special)
