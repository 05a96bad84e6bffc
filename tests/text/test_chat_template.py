"""Chat templates run where they can be ended, and give what the tokenizer itself would."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from sleb.errors import WorkEnded
from sleb.text import chat_template
from sleb.text.chat_template import Conversation
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


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
FULL = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m['role'] }}"
    "{{ ' ' + m['name'] if m['name'] else '' }}]{{ m['reasoning_content'] }}{{ m['content'] }}"
    "{% for c in m['tool_calls'] %}{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}{% endfor %}"
    "{{ 'quick' if enable_thinking is false }}"
)
PARTS = "{% for m in messages %}{{ m['role'] }}:{% for p in m['content'] %}{{ p['text'] }},{% endfor %}{% endfor %}"
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ p.text }}{% endfor %}{% endif %};{% endfor %}"
)
FIRST = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }};{% endfor %}"
PLAIN = "{% for m in messages %}{{ m['content'] }};{% endfor %}"
JSON = "{% for m in messages %}{{ m['content'] | tojson }};{% endfor %}"


def texts_of(template: str, *rows: tuple[list[Any], dict[str, Any]]) -> list[str]:
    given = [chat_template.conversation(messages, beside) for messages, beside in rows]
    return chat_template.rendered(with_template(template), given).texts


def test_messages_go_to_the_template_as_they_are() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "name": "ann", "content": "now?", "tool_calls": None},
        {"role": "assistant", "content": None, "reasoning_content": "hm ", "tool_calls": [CALL]},
        {"role": "tool", "content": "7 C"},
    ]
    tools = '[{"type": "function", "function": {"name": "weather", "parameters": {}}}]'
    beside = {"system": "Be brief.", "chat_template_kwargs": {"enable_thinking": False}}
    rows = [(messages, {}), (messages, beside | {"tools": tools}), (messages, beside | {"tools": [TOOL]})]
    expected = "[user ann]now?[assistant]hm weather(Oslo)[tool]7 C"
    with_all = f"<s>{tools}[system]Be brief.{expected}quick"
    assert texts_of(FULL, *rows) == ["<s>" + expected, with_all, with_all]


@pytest.mark.parametrize(
    ("template", "one", "two"),
    [
        (PLAIN, "a\nb;", "a;"),
        (FIRST, "a\nb;", "a;"),
        (EITHER, "ab;", "a;"),
        (PARTS, "user:a,b,", "user:a,"),
        (JSON, '"a\\nb";', '"a";'),
    ],
)
def test_content_is_given_as_the_template_reads_it(template: str, one: str, two: str) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}]
    assert texts_of(template, (parts, {}), ([{"role": "user", "content": "a"}], {})) == [one, two]


def test_a_text_to_be_found_again_does_not_have_todays_date() -> None:
    dated = with_template("{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert chat_template.rendered(dated, TALK[1:], day=datetime(2024, 7, 26)).texts == ["26 Jul 2024again"]
    assert chat_template.rendered(dated, TALK[1:]).texts[0][7:11] == str(datetime.now().year)


def test_tools_that_a_template_leaves_out_are_counted() -> None:
    with_call = Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL]}])
    with_tools = Conversation([{"role": "user", "content": "a"}], [TOOL])
    conversations = [with_call, with_tools, Conversation([{"role": "user", "content": "a"}])]
    assert chat_template.rendered(with_template(PLAIN), conversations).without_tools == 2
    assert chat_template.rendered(with_template(FULL), conversations).without_tools == 0


def test_the_conversation_that_a_template_refuses_is_named() -> None:
    strict = (
        "{% for m in messages %}{{ raise_exception('no ' + m.role) if m.role != 'user' }}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(chat_template.RefusedConversation, match="no critic") as refused:
        chat_template.rendered(
            with_template(strict), [TALK[1], Conversation([{"role": "critic", "content": "a"}]), TALK[1]]
        )
    assert refused.value.index == 1


@pytest.mark.parametrize(
    ("messages", "beside", "why"),
    [
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            {},
            "message 1 has a part of type 'im",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, "a part of type 'text'"),
        ([{"role": "user", "content": 7}], {}, "the content of message 1 is 7, not text"),
        ([{"role": "user", "text": "a"}], {}, "has the keys role, text; role and content are needed"),
        ([{"role": "user", "content": "a"}, {"content": "a"}], {}, "message 2 has the keys content"),
        ([{"from": "function_call", "value": "{}"}], {}, "message 1 is from 'function_call', and known are human, gpt"),
        ([{"role": "user", "content": "a"}], {"tools": "[{"}, "its tools are not JSON"),
        ([{"role": "user", "content": "a"}], {"tools": ["a"]}, "its tools are not a list of objects"),
        ([{"role": "user", "content": "a"}], {"system": ["a"]}, "its system column holds list"),
        (
            [{"role": "system", "content": "a"}],
            {"system": "b"},
            "its system column and its first message say",
        ),
        (
            [{"role": "user", "content": "a"}],
            {"chat_template_kwargs": {"continue_final_message": True}},
            "chat_template_kwargs set 'continue_final_message', which is not a variable",
        ),
        ([{"role": "user", "content": "a"}], {"chat_template_kwargs": {"bos_token": "Z"}}, "set 'bos_token'"),
    ],
)
def test_what_is_no_text_is_refused_in_a_clause(messages: list[Any], beside: dict[str, Any], why: str) -> None:
    with pytest.raises(WorkEnded, match=why):
        chat_template.conversation(messages, beside)
