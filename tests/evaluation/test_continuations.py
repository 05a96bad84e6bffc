"""`sleb generate`: the same text as transformers' own generate, the same flips as a plain comparison, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sleb
from app.components import side_by_side
from sleb import api, execution
from sleb.cli.findings_output import _parting
from sleb.cli.main import app
from sleb.errors import OptionError, SlebError
from sleb.evaluation import continuations, request
from sleb.evaluation.continuations import piece_after, pieces_of
from sleb.evaluation.evaluated_model import Subject
from sleb.export.removal import remove_blocks
from sleb.model.block_stack import BlockStack
from sleb.model.loading import LoadedModel
from sleb.records import GenerateSpec, Generation, Progress, RemovalList
from sleb.runtime import findings_folder
from sleb.runtime.processes.progress import Meter, Watcher
from tests.support import tiny
from tests.support.families import POSITIONS, build
from tests.support.runs import judged
from tests.support.runs.stores import write_run

PROMPT = "the block of a model"


def ask(
    model: Path, *lists: RemovalList, watcher: Watcher | None = None, **settings: Any
) -> tuple[list[Generation], sleb.Run]:
    """What these lists say; the same run for the same model."""
    run = request.subject_run(str(model), [], dtype="float32")
    job = request.job_of(
        request.ask_of(GenerateSpec, lists=lists, **(dict(prompt=PROMPT, tokens=10) | settings)), device="cpu"
    )
    done = execution.execute(run, job, watcher)
    return findings_folder.of_kind(request.answers(done), Generation), done


def opened(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def greedy(model: Any, prompt: torch.Tensor, tokens: int, **settings: Any) -> list[int]:
    """As transformers' own documentation has it."""
    with torch.no_grad():
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False, **settings
        )
    return ids[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("family", "removal_list"),
    [
        ("llama", (1, 3)),
        ("llama", (0, 1, 2, 4, 5)),  # one block stays
        ("gemma3", (0, 4)),
        ("mamba", (2,)),
        ("jamba", (0, 3)),
        ("mixtral", (5,)),
    ],
)
def test_texts_and_flips_are_those_of_transformers_own(family: str, removal_list: RemovalList, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / family, family)
    (found,), _ = ask(folder, removal_list)
    model, tokenizer = opened(folder)
    prompt = torch.tensor([tokenizer(PROMPT).input_ids])
    said = greedy(model, prompt, 10)
    assert list(found.baseline_ids) == said
    assert (found.cached, found.baseline_cached) == (True, True)

    whole = torch.tensor([[*prompt[0].tolist(), *said]])
    with torch.no_grad():
        before = model(whole[:, :-1], use_cache=False).logits[0].softmax(dim=-1)
        with BlockStack(model).skipping(removal_list):
            after = model(whole[:, :-1], use_cache=False).logits[0].softmax(dim=-1)
    expected = {
        index + 1: (before[index].max().item(), after[index].max().item())
        for index in range(len(before))
        if before[index].argmax() != after[index].argmax()
    }
    assert expected or family == "mamba"  # whose tiny blocks turn over no prediction
    assert found.compared == len(before) == whole.shape[1] - 1
    assert [flip.position for flip in found.flips] == list(expected)
    for flip in found.flips:
        assert (flip.before_probability, flip.after_probability) == pytest.approx(expected[flip.position], rel=1e-4)
        names = [tokenizer.convert_ids_to_tokens(each[flip.position - 1].argmax().item()) for each in (before, after)]
        for shown, name in zip((flip.before, flip.after), names, strict=True):
            assert shown.strip(" ") == name.strip(" ") if name else shown.startswith("<")  # one the tokenizer lacks

    remove_blocks(model, removal_list)  # saved and loaded again: what an export gives
    model.save_pretrained(str(tmp_path / "smaller"))
    tokenizer.save_pretrained(str(tmp_path / "smaller"))
    smaller, _ = opened(tmp_path / "smaller")
    assert list(found.ids) == greedy(smaller, prompt, 10)


def test_a_text_ends_with_the_models_own_end_of_sequence(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    (free,), _ = ask(folder, (1, 3))
    end = free.baseline_ids[3]
    first = free.baseline_ids.index(end)
    model = build("llama")
    model.generation_config.eos_token_id = [2, end]
    model.generation_config.repetition_penalty = 1.5  # of which a greedy text knows nothing
    model.save_pretrained(str(tmp_path / "ending"))
    tiny.tokenizer().save_pretrained(str(tmp_path / "ending"))
    (found,), _ = ask(tmp_path / "ending", (1, 3))
    assert found.baseline_ids == free.baseline_ids[: first + 1]
    assert len(found.baseline_tokens) == first + 1
    assert found.compared == len(PROMPT) + first


def test_every_list_is_kept_at_once_and_not_computed_again(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    phases: list[str] = []

    class Stopping(Watcher):
        """Ctrl-C when the second list begins."""

        def progress(self, progress: Progress) -> None:
            if progress.phase not in phases[-1:]:
                phases.append(progress.phase)
            if "2 of 6" in progress.phase:
                raise KeyboardInterrupt

    class Listening(Watcher):
        def progress(self, progress: Progress) -> None:
            if progress.phase not in phases[-1:]:
                phases.append(progress.phase)

    with pytest.raises(KeyboardInterrupt):
        ask(folder, (1,), (1, 3), watcher=Stopping())
    assert phases[-3:] == [
        f"Continuing the prompt, {which}" for which in ("the unmodified model", "1 of 6 blocks removed")
    ] + ["Continuing the prompt, 2 of 6 blocks removed"]
    run = request.subject_run(str(folder), [], dtype="float32")
    (first,) = findings_folder.of_kind(findings_folder.findings(run.run_dir), Generation)
    assert first.removal_list == (1,)

    phases.clear()
    both, _ = ask(folder, (1,), (1, 3), watcher=Listening())
    assert both[0] == first
    assert both[1].removal_list == (1, 3)
    assert both[1].baseline_ids == first.baseline_ids
    assert [each for each in phases if each.startswith("Continuing")] == [
        "Continuing the prompt, 2 of 6 blocks removed"
    ]

    phases.clear()
    again, run = ask(folder, (1, 3), watcher=Listening())  # whatever was asked beside it
    assert again == both[1:]
    assert not any(each.startswith("Continuing") for each in phases)
    other, run = ask(folder, (1, 3), tokens=4)
    assert other[0].ids == both[1].ids[:4]
    assert len(findings_folder.findings(run.run_dir)) == 3


def test_the_unmodified_model_alone(tmp_path: Path) -> None:
    (found,), _ = ask(tiny.save(tmp_path / "model"))
    assert found.removal_list == ()
    assert found.ids == found.baseline_ids
    assert (found.flips, found.compared) == ((), 0)


def test_where_a_cache_does_not_work_the_text_is_generated_without_one(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "rwkv")
    (found,), _ = ask(folder, (0,))  # its first block makes the state that all others write into
    assert (found.baseline_cached, found.cached) == (True, False)
    model, tokenizer = opened(folder)
    prompt = torch.tensor([tokenizer(PROMPT).input_ids])
    with BlockStack(model).skipping((0,)):
        assert list(found.ids) == greedy(model, prompt, 10, use_cache=False)


def test_where_a_cache_is_wrong_the_text_is_generated_without_one(tmp_path: Path) -> None:
    """Two blocks with one index write into the same cache: the mistake that removals are known for."""
    folder = tiny.save(tmp_path / "model")
    _, run = ask(folder)
    model, tokenizer = opened(folder)
    prompt = torch.tensor([tokenizer(PROMPT).input_ids])
    right = greedy(model, prompt, 10)
    model.model.layers[3].self_attn.layer_idx = 2
    assert greedy(model, prompt, 10) != right
    loaded = LoadedModel(model, tokenizer, str(folder), None, "float32", "cpu")
    subject = Subject(run, run.jobs[-1].spec, run.jobs[-1].directory, loaded, BlockStack(model), Meter())
    continuations.work(subject, GenerateSpec(prompt=PROMPT, tokens=9))
    found = findings_folder.of_kind(findings_folder.findings(run.run_dir), Generation)[-1]
    assert (found.baseline_cached, found.cached) == (False, False)
    assert list(found.ids) == right[:9]


def test_blocks_that_a_family_cannot_lose_are_skipped(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "jamba")
    (found,), _ = ask(folder, (2,))
    model, tokenizer = opened(folder)
    prompt = torch.tensor([tokenizer(PROMPT).input_ids])
    with BlockStack(model).skipping((2,)):
        assert list(found.ids) == greedy(model, prompt, 10, use_cache=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "model")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"prompt": ""}, r"The prompt is empty; give some text"),
        ({"prompt": " \n"}, r"The prompt is empty"),
        ({"prompt": "x" * 100, "tokens": 29}, r"has 100 tokens, 29 more .* 128 positions; give --tokens 28 or less"),
        ({"prompt": "x" * 128, "tokens": 1}, r"has 128 tokens, 1 more .* 128 positions; shorten the prompt"),
        ({"chat": True}, r"`chat`: this model's tokenizer has no chat template"),
        ({"prompt": "a\udcffb"}, r"The prompt is no UTF-8 text \(character 1\)"),
        ({"tokens": 0}, r"--tokens: found 0"),
    ],
)
def test_bad_input_is_one_sentence(settings: dict[str, Any], sentence: str, folder: Path) -> None:
    with pytest.raises(OptionError, match=sentence):
        ask(folder, (1, 3), **settings)


def test_every_position_may_be_used(folder: Path) -> None:
    (found,), _ = ask(folder, (1,), prompt="x" * (POSITIONS - 2), tokens=2)
    assert (len(found.prompt_tokens), len(found.ids), found.compared) == (126, 2, 127)


def chatting(folder: Path, template: str) -> Path:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(folder))
    return folder


def test_a_chat_is_a_users_turn_in_the_models_template(folder: Path) -> None:
    template = tiny.CHAT + "{% if add_generation_prompt %}assistant: {% endif %}"
    folder = chatting(folder, template)
    (found,), _ = ask(folder, (1, 3), prompt="hi", chat=True)
    assert [each.strip(" ") for each in found.prompt_tokens] == [each.strip(" ") for each in "user: hi\nassistant: "]
    (plain,), _ = ask(folder, (1, 3), prompt="hi")
    assert plain.question != found.question


def test_a_template_that_refuses_a_user_is_said(folder: Path) -> None:
    with pytest.raises(OptionError, match=r"`chat`: the tokenizer's chat template refuses a user's turn \(no users"):
        ask(chatting(folder, "{{ raise_exception('no users here') }}"), (1, 3), prompt="hi", chat=True)


def test_a_prompt_that_begins_with_bos_gets_no_other(folder: Path) -> None:
    tiny.tokenizer(adds_bos=True).save_pretrained(str(folder))
    (found,), _ = ask(folder, (1,), prompt="<s>hi")
    (same,), _ = ask(folder, (1,), prompt="hi")
    assert found.prompt_tokens == same.prompt_tokens
    assert len(found.prompt_tokens) == 3
    assert found.ids == same.ids


def test_a_model_that_stays_on_disk_generates_nothing(tmp_path: Path) -> None:
    from sleb.model.loading import load_model
    from tests.support.streamed import saved, tight

    model = saved(tmp_path / "model", "llama")
    budget = tight(load_model(str(model), dtype="float32", device="cpu"))
    with pytest.raises(OptionError, match=r"read from disk block by block .* generating would read"):
        api.generate(str(model), "ab", removal_list=[1], dtype="float32", device="cpu", memory_budget=budget)


def byte_level() -> Any:
    """A token a byte, as GPT-2 writes them: 'Ġ' for a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0} | {letter: index for index, letter in enumerate(alphabet, 1)}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def with_word_marks() -> Any:
    """Tokens that begin with '▁' for a space, as SentencePiece writes them; the first space of a text is dropped."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["</s>", "<unk>", "▁the", "▁", "t", "h", "e", "▁sea"]
    inner = Tokenizer(models.Unigram([(word, -float(index)) for index, word in enumerate(words)], unk_id=1))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


def test_tokens_are_shown_as_the_text_they_stand_for() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a Tür 海😀")["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert pieces == ["a", " ", "T", "", "ü", "r", " ", "", "", "海", "", "", "", "😀"]
    assert pieces_of(tokenizer, [*ids[:4], 0]) == ["a", " ", "T", "", "\N{REPLACEMENT CHARACTER}</s>"]
    assert pieces_of(tokenizer, ids[:4]) == ["a", " ", "T", "\N{REPLACEMENT CHARACTER}"]
    assert pieces_of(tokenizer, []) == []
    assert piece_after(tokenizer, ids[:3], ids[1]) == " "
    assert piece_after(tokenizer, ids[:4], ids[4]) == "ü"
    assert piece_after(tokenizer, ids[:3], ids[3]) == "<0xC3>"  # half a character: its byte
    assert piece_after(tokenizer, [], 0) == "</s>"

    tokenizer = with_word_marks()
    assert pieces_of(tokenizer, [2, 7, 2, 4]) == ["the", " sea", " the", "t"]
    assert piece_after(tokenizer, [2], 7) == " sea"


def command(*words: object) -> str:
    result = CliRunner().invoke(app, ["generate", *(str(word) for word in words)])
    if isinstance(result.exception, SlebError):
        raise result.exception
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_on_the_command_line(folder: Path) -> None:
    words = [folder, "--removal-list", "[3, 1]", "--prompt", PROMPT, "--tokens", 6, "--dtype", "float32"]
    (found,) = json.loads(command(*words, "--json"))["findings"]
    assert found["removal_list"] == [1, 3]
    assert len(found["tokens"]) == len(found["baseline_tokens"]) == 6
    printed = command(*words)
    assert "The unmodified model (6 tokens in" in printed
    assert "Without 1, 3 (6 tokens in" in printed
    flips = found["flips"]
    assert f"{len(flips)} of {len(PROMPT) + 5} predictions" in printed
    rows = [line for line in printed.splitlines() if line.split()[:1] == [str(flips[0]["position"])]]
    assert len(rows) == 1
    assert f"{flips[0]['after_probability']:.0%}" in rows[0]
    alone = command(*words[:1], "--removal-list", "[]", *words[3:])
    assert "The unmodified model" in alone
    assert "Without" not in alone


def test_a_refused_prompt_leaves_no_run_behind(folder: Path) -> None:
    with pytest.raises(OptionError, match="The prompt is empty"):
        command(folder, "--removal-list", "[1]", "--prompt", " ")
    assert sleb.runs() == []


def test_parts_of_characters_are_their_bytes_and_told_apart_by_their_ids(tmp_path: Path) -> None:
    tokenizer = byte_level()
    ids = tokenizer("a€", add_special_tokens=False)["input_ids"]
    assert [piece_after(tokenizer, ids[:at], ids[at]) for at in range(4)] == ["a", "<0xE2>", "<0x82>", "€"]
    other = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert piece_after(tokenizer, ids[:2], other[0]) == "<0xC3>"  # which ends the character before

    flips = continuations._flips(tokenizer, ids, predictions(ids[1:]), predictions([ids[1], other[1], ids[3]]))
    assert [(each.position, each.before, each.after) for each in flips] == [(2, "<0x82>", "<0xA9>")]
    alike = continuations._flips(Alike(), [0, 0], predictions([1]), predictions([2]))
    assert [(each.before, each.after) for each in alike] == [("x (token 1)", "x (token 2)")]

    run = write_run(tmp_path / "run")
    tokens = {"baseline_tokens": ("", "", "€"), "tokens": ("", "", "é")}
    known = judged.generation(run, (1,), **tokens, baseline_ids=ids[1:], ids=(ids[1], other[1], ids[3]))
    assert _parting(known) == "another text from token 2 on"
    assert side_by_side.payload(known)["texts"][1]["differs"] == [1]
    earlier = judged.generation(run, (1,), **tokens)  # texts are all that is known of it
    assert _parting(earlier) == "another text from token 3 on"
    assert side_by_side.payload(earlier)["texts"][1]["differs"] == [2]


class Alike:
    """A vocabulary in which all tokens look the same."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "x" * len(ids)


def predictions(tokens: list[int]) -> continuations._Predictions:
    return continuations._Predictions(torch.tensor(tokens), torch.full((len(tokens),), 0.5))
