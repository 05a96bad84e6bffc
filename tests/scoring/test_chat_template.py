"""Chat templates run where they can be ended, and give what the tokenizer itself would."""

from __future__ import annotations

from typing import Any

import pytest

from sleb.errors import WorkEnded
from sleb.scoring import chat_template
from sleb.scoring.chat_template import Conversation
from tests.support import tiny

TALK = [
    Conversation([{"role": "user", "content": "skip it \ud83d"}, {"role": "assistant", "content": "dönè 漢"}]),
    Conversation([{"role": "user", "content": "again"}]),
]
REAL = (
    "{{ bos_token }}{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "<|{{ m['role'] }}|>{{ m['content'] | trim }}{{ eos_token if loop.last else '' }}{{ ns.n }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{{ messages | tojson }}{{ tools is none }}{{ raise }}"
)


def with_template(template: Any) -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(("template", "reply"), [(REAL, True), ({"default": tiny.CHAT, "tools": "no"}, False)])
def test_the_text_is_that_of_the_tokenizer_itself(template: Any, reply: bool) -> None:
    tokenizer = with_template(template)
    expected = [
        tokenizer.apply_chat_template(each.messages, tokenize=False, add_generation_prompt=reply) for each in TALK
    ]
    assert chat_template.rendered(tokenizer, TALK, reply=reply).texts == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'a' * 10**11 }}", "memory"),
        ("{% for i in range(99999) %}{{ 'ab' * 99 }}{% endfor %}", "more than 1 MB"),
        ("{{ raise_exception('no \x1b[31musers ' + 'x' * 5000) }}", r"^no .{1,4}\[31musers x{100,}"),
        ("{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}", "nested too deeply"),
        ({"tools": "no"}, "default"),
        (5, "TypeError"),
    ],
)
def test_a_template_without_bounds_is_refused_in_a_clause(template: Any, reason: str) -> None:
    with pytest.raises(WorkEnded, match=reason) as refused:
        chat_template.rendered(with_template(template), TALK)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) <= 200


def test_a_template_that_loops_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleb.bounded.SECONDS", 1.0)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(WorkEnded, match="more than 1 seconds"):
        chat_template.rendered(with_template(loop), TALK)


def test_a_tokenizer_with_a_renderer_of_its_own_is_asked_itself() -> None:
    class Own(type(tiny.tokenizer())):  # type: ignore[misc]
        def apply_chat_template(self, conversation: Any, **options: Any) -> str:
            if len(conversation) == 1:
                raise ValueError("one turn is too few")
            return f"own: {len(conversation)}"

    tokenizer = tiny.tokenizer()
    tokenizer.__class__ = Own
    assert chat_template.rendered(tokenizer, TALK[:1]).texts == ["own: 2"]
    with pytest.raises(WorkEnded, match="too few"):
        chat_template.rendered(tokenizer, TALK)
