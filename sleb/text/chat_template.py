"""Conversations -> text by a tokenizer's own chat template. A template is a program: it runs where it can be ended.

What a row says goes to the template as it is: tool calls, names, reasoning, tools. Two things are changed, which
the template would misread: a field that is null is left out, as transformers does, and content is given as a text or
as parts, whichever the template reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

from sleb import bounded
from sleb.errors import WorkEnded, excerpt, quoted, sentence

_SECONDS_PER_CONVERSATION = 0.01
_GROWTH = 4
"""The largest growth of a text, beside what a template writes around it."""
_AROUND, _ONCE = 4_000, 1_000_000  # bytes, of each conversation and of all
_FAILURES = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)
_ARGUMENTS = frozenset(
    {
        *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
"""Arguments of `apply_chat_template` itself: a row that sets one changes more than its own text."""
_SHAREGPT = {
    **{"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"},
    **{"system": "system", "tool": "tool", "observation": "tool"},
}
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_BETWEEN_PARTS = "\n"  # as vLLM and llama.cpp join them for a template that reads no parts
_SIGNS = ("sign 7f3a", "sign 9c41")  # not in any template


class RefusedConversation(WorkEnded):
    """A template or a layout refuses one conversation; the message is a clause that says why."""

    def __init__(self, index: int, why: str) -> None:
        self.index = index
        super().__init__(why)


@dataclass(frozen=True)
class Conversation:
    """The input of a template."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] = ()
    options: dict[str, Any] = field(default_factory=dict)
    """Other variables of the template, such as `enable_thinking`."""


@dataclass(frozen=True)
class Rendering:
    """The text of each conversation, and what is not in it."""

    texts: list[str]
    without_tools: int = 0
    """Conversations with tools or calls of them, of which the template writes nothing."""


def conversation(messages: Sequence[dict[str, Any]], beside: dict[str, Any]) -> Conversation:
    """Messages of a row with what stands beside them (`tools`, `system`, `chat_template_kwargs`).

    Raises `WorkEnded` for a layout that is not known, and for content that is not text.
    """
    turns = [_message(turn, number) for number, turn in enumerate(messages, 1)]
    system = beside.get("system")
    if system is not None and not isinstance(system, str):
        raise WorkEnded(f"its system column holds {type(system).__name__}, not text")
    if system and turns and turns[0]["role"] == "system" and turns[0]["content"] != system:
        raise WorkEnded("its system column and its first message say different things")
    if system and turns and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    options = _parsed(beside.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    if not isinstance(options, dict):
        raise WorkEnded("its chat_template_kwargs are not an object")
    if own := sorted(name for name in options if name in _ARGUMENTS or name.endswith("_token")):
        raise WorkEnded(f"its chat_template_kwargs set {quoted(own[0])}, which is not a variable of a template")
    tools = _parsed(beside.get("tools") or [], "tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise WorkEnded("its tools are not a list of objects (JSON schemas)")
    return Conversation(turns, tools, options)


def _parsed(value: Any, name: str) -> Any:
    """A value, or what its JSON says: a table without types of its own has tools as such a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise WorkEnded(f"its {name} are not JSON ({excerpt(error, 80)})") from error


def _message(turn: dict[str, Any], number: int) -> dict[str, Any]:
    if "role" not in turn and "from" in turn and "value" in turn:  # the ShareGPT layout
        role = _SHAREGPT.get(str(turn["from"]))
        if role is None:
            raise WorkEnded(
                f"message {number} is from {quoted(turn['from'])}, and known are {', '.join(_SHAREGPT)}; write it with "
                "role and content"
            )
        turn = {"role": role, "content": turn["value"]}
    fields = {name: value for name, value in turn.items() if value is not None}
    has_content = "content" in turn or any(name in fields for name in _INSTEAD_OF_CONTENT)
    if not isinstance(fields.get("role"), str) or not has_content:
        names = excerpt(", ".join(sorted(map(str, turn))[:8])) or "none"
        raise WorkEnded(f"message {number} has the keys {names}; role and content are needed")
    content = fields.get("content")
    if isinstance(content, list):
        fields["content"] = [_part(each, number) for each in content]
    elif content is not None and not isinstance(content, str):
        raise WorkEnded(f"the content of message {number} is {quoted(content)}, not text")
    return fields


def _part(part: Any, number: int) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part | {"type": "text"}
    kind = part.get("type") if isinstance(part, dict) else part
    raise WorkEnded(f"message {number} has a part of type {quoted(kind)}; only text parts can be scored")


def rendered(
    tokenizer: Any, conversations: Sequence[Conversation], *, reply: bool = False, day: datetime | None = None
) -> Rendering:
    """The text of each conversation; with `reply` up to where the assistant's next turn begins.

    Templates that write the date write that of `day`, or today's.

    All of them take one process, about a second. The same text as from the tokenizer's `apply_chat_template`. Raises
    `RefusedConversation` where the template refuses one, `WorkEnded` where it takes too long or gives too much text.
    """
    from transformers import PreTrainedTokenizerBase

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        # The tokenizer's code, no template.
        return Rendering([_by_itself(tokenizer, each, reply, index) for index, each in enumerate(conversations)])
    try:
        template = tokenizer.get_chat_template()
        with_tools = tokenizer.get_chat_template(tools=[{}])
        special = dict(tokenizer.special_tokens_map)
    except _FAILURES as error:
        raise WorkEnded(excerpt(error)) from error
    count = len(conversations)
    given = [(list(each.messages), list(each.tools), each.options) for each in conversations]
    try:
        size = len(json.dumps(given))
    except RecursionError as error:
        raise WorkEnded("a conversation is nested too deeply") from error
    most = _GROWTH * size + count * _AROUND + _ONCE
    answer = bounded.call(
        _rendered,
        (template, with_tools),
        special,
        given,
        reply,
        day and day.isoformat(),
        seconds=bounded.SECONDS + count * _SECONDS_PER_CONVERSATION,
        memory=bounded.MEMORY + 8 * most,
        answer=most,
    )
    if "refused" in answer:
        raise RefusedConversation(answer["refused"], excerpt(sentence(answer["why"])))
    return Rendering(answer["texts"], answer["without_tools"])


def _rendered(
    templates: tuple[str, str],
    special: dict[str, Any],
    conversations: list[tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]],
    reply: bool,
    day: str | None,
) -> dict[str, Any]:
    """In the child, by transformers' own sandbox; the tokenizer itself is not needed for it."""
    from jinja2 import TemplateError
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils

    if day is not None:  # the process ends with this work
        module: Any = chat_template_utils
        module.datetime = type("Day", (), {"now": lambda: datetime.fromisoformat(day)})
    base = PreTrainedTokenizerBase()

    def render(messages: list[dict[str, Any]], tools: list[Any], options: dict[str, Any]) -> str:
        return str(
            base.apply_chat_template(
                messages, tools=tools or None, chat_template=templates[bool(tools)], tokenize=False,
                add_generation_prompt=reply, **{**special, **options},
            )
        )  # fmt: skip

    texts: list[str] = []
    without_tools = 0
    contents = _Contents(lambda messages: render(messages, [], {}))
    for index, (messages, tools, options) in enumerate(conversations):
        try:
            adapted = [contents.adapted(turn) for turn in messages]
            texts.append(render(adapted, tools, options))
            bare = [{name: value for name, value in turn.items() if name != "tool_calls"} for turn in adapted]
        except TemplateError as error:  # its own words: templates refuse what they do not know
            return {"refused": index, "why": str(error)}
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # whatever a template's own expressions raise
            return {"refused": index, "why": f"{type(error).__name__}: {error}"}
        if tools or bare != adapted:
            without_tools += _tried(partial(render, bare, [], options)) == texts[-1]
    return {"texts": texts, "without_tools": without_tools}


def _tried(render: Callable[[], str]) -> str | None:
    try:
        return render()
    except (MemoryError, RecursionError):
        raise
    except Exception:  # whatever a template's own expressions raise
        return None


class _Contents:
    """The form in which a template reads the content of each role, found by trying both: text, parts, or either."""

    def __init__(self, render: Callable[[list[dict[str, Any]]], str]) -> None:
        self._render = render
        self._known: dict[str, tuple[bool, bool]] = {}

    def adapted(self, turn: dict[str, Any]) -> dict[str, Any]:
        """The message as the template reads it."""
        content = turn.get("content")
        if content is None or content == []:
            return {name: value for name, value in turn.items() if name != "content"}
        texts, parts = self._reads(turn["role"])
        if isinstance(content, list) and not parts:
            return turn | {"content": _BETWEEN_PARTS.join(part["text"] for part in content)}
        if isinstance(content, str) and parts and not texts:
            return turn | {"content": [{"type": "text", "text": content}]}
        return turn

    def _reads(self, role: str) -> tuple[bool, bool]:
        if role not in self._known:
            text = _tried(lambda: self._render(_example(role, _SIGNS[0])))
            both = [{"type": "text", "text": sign} for sign in _SIGNS]
            parts = _tried(lambda: self._render(_example(role, both)))
            of_parts = (
                parts is not None
                and all(sign in parts for sign in _SIGNS)  # some read the first alone
                and _quoted_keys(parts) <= _quoted_keys(text or "")  # and some write the list down as it is
            )
            self._known[role] = (text is not None and _SIGNS[0] in text, of_parts)
        return self._known[role]


def _quoted_keys(text: str) -> int:
    """The number of times that a part's key stands in a text as Python and JSON write it."""
    return text.count("'type'") + text.count('"type"')


def _example(role: str, content: Any) -> list[dict[str, Any]]:
    """A conversation with a message of this role, as templates expect it."""
    turn, user = {"role": role, "content": content}, {"role": "user", "content": "a"}
    return {"user": [turn], "system": [turn, user]}.get(role, [user, turn])


def _by_itself(tokenizer: Any, given: Conversation, reply: bool, index: int) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                list(given.messages), tools=list(given.tools) or None, tokenize=False, add_generation_prompt=reply,
                **given.options,
            )
        )  # fmt: skip
    except _FAILURES as error:
        raise RefusedConversation(index, excerpt(error)) from error
