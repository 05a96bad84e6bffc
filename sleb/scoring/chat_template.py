"""Conversations -> text by a tokenizer's own chat template. A template is a program: it runs where it can be ended."""

from __future__ import annotations

from typing import Any

from sleb import bounded
from sleb.errors import WorkEnded, excerpt

_SECONDS_PER_CONVERSATION = 0.003
_GROWTH = 4
"""Text may become so many times as long, beside what a template writes around it."""
_AROUND, _ONCE = 4_000, 1_000_000  # bytes, of each conversation and of all
_FAILURES = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)

Conversation = list[dict[str, str]]


def rendered(tokenizer: Any, conversations: list[Conversation], *, reply: bool = False) -> list[str]:
    """The text of each conversation; with `reply` up to where the assistant's next turn begins.

    All of them take one process, about a second. The same text as from the tokenizer's `apply_chat_template`. Raises
    `WorkEnded` where the template refuses, takes too long, or makes too much of a text.
    """
    from transformers import PreTrainedTokenizerBase

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return [_by_itself(tokenizer, each, reply) for each in conversations]  # the tokenizer's code, no template
    try:
        template = tokenizer.get_chat_template()
        special = dict(tokenizer.special_tokens_map)
    except _FAILURES as error:
        raise WorkEnded(excerpt(error)) from error
    count = len(conversations)
    size = sum(
        len(text.encode("utf-8", "replace")) for each in conversations for turn in each for text in turn.values()
    )
    most = _GROWTH * size + count * _AROUND + _ONCE
    found: list[str] = bounded.call(
        _rendered,
        template,
        special,
        conversations,
        reply,
        seconds=bounded.SECONDS + count * _SECONDS_PER_CONVERSATION,
        memory=bounded.MEMORY + 8 * most,
        answer=most,
    )
    return found


def _rendered(template: str, special: dict[str, Any], conversations: list[Conversation], reply: bool) -> list[str]:
    """In the child, by transformers' own sandbox; the tokenizer itself is not needed for it."""
    from jinja2 import TemplateError
    from transformers import PreTrainedTokenizerBase

    try:
        found = PreTrainedTokenizerBase().apply_chat_template(
            conversations, chat_template=template, tokenize=False, add_generation_prompt=reply, **special
        )
    except TemplateError as error:  # its own words: templates refuse what they do not know
        raise WorkEnded(str(error)) from error
    return [str(text) for text in found]


def _by_itself(tokenizer: Any, conversation: Conversation, reply: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=reply))
    except _FAILURES as error:
        raise WorkEnded(excerpt(error)) from error
