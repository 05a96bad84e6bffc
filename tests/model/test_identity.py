"""What a model is besides its weights: what is the same under it, and what is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

import sleb
from sleb.errors import RunError
from sleb.model.identity import computing_fields, default_fields, identity_of, tokenizer_hash
from sleb.model.loading import load_model
from sleb.records import ModelIdentity
from sleb.runtime import origin
from tests.support import tiny


def rewrite(folder: Path, **changes: Any) -> None:
    """Change fields of a model's config; None takes one away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "model")


def identity(folder: Path) -> ModelIdentity:
    return identity_of(load_model(str(folder), dtype="float32", device="cpu"))


# --- the config


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers_version": "4.40.0"},
        {"architectures": ["SomethingElse"], "use_cache": False, "output_attentions": False, "return_dict": False},
        {"id2label": {"0": "good"}, "label2id": {"good": 0}, "problem_type": "regression"},
        {"_name_or_path": "/some/where", "_commit_hash": "abc", "_attn_implementation": "eager"},
        {"temperature": 0.7, "top_k": 3, "num_beams": 4, "repetition_penalty": 1.1},
        {"dtype": "bfloat16"},
        {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 10000.0, "type": "default"}},
        {"attention_bias": None, "mlp_bias": None, "hidden_act": None, "attention_dropout": None},
    ],
)
def test_what_computes_nothing_or_says_the_same_is_the_same_model(changes: dict[str, Any], model: Path) -> None:
    before = identity(model)
    rewrite(model, **changes)
    assert identity(model) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            "rope.rope_theta was 10000 and is 500000",
        ),
        ({"rope_parameters": None, "rope_theta": 5e5}, "rope.rope_theta was 10000 and is 500000"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
            "rope.factor was not there and is 2; rope.rope_type",
        ),
        ({"rms_norm_eps": 0.01}, "rms_norm_eps was 1e-06 and is 0.01"),
        ({"hidden_act": "gelu"}, 'hidden_act was "silu" and is "gelu"'),
        ({"eos_token_id": 7}, "eos_token_id was"),
        ({"something_of_its_own": {"scale": 3}}, "something_of_its_own.scale was not there and is 3"),
    ],
)
def test_what_computes_is_another_model_and_is_named(changes: dict[str, Any], message: str, model: Path) -> None:
    before = identity(model)
    rewrite(model, **changes)
    now = identity(model)
    config = load_model(str(model), dtype="float32", device="cpu").model.config
    assert message in "; ".join(before.differences(now, default_fields(config)))
    assert before.key("weights", "float32") != now.key("weights", "float32")


def test_equal_settings_of_another_kind_of_model_are_another_model() -> None:
    settings: dict[str, Any] = dict(vocab_size=128, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
    llama, granite = transformers.LlamaConfig(**settings), transformers.GraniteConfig(**settings)
    before, now = (ModelIdentity(config=computing_fields(each), tokenizer="") for each in (llama, granite))
    assert before.differences(now)[0] == 'model_type was "llama" and is "granite"'


def test_what_a_rotary_embedding_lacks_is_no_default_of_its_class() -> None:
    """GPT-NeoX turns a quarter of each head by default; one that turns all of it is another model."""
    usual = transformers.GPTNeoXConfig()
    whole = transformers.GPTNeoXConfig(
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    )
    before, now = (ModelIdentity(config=computing_fields(each), tokenizer="") for each in (usual, whole))
    assert before.differences(now, default_fields(usual)) == ["rope.partial_rotary_factor was 0.25 and is not there"]


def test_each_kind_of_rope_and_nested_configs_count() -> None:
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    plain = transformers.Gemma3TextConfig(num_hidden_layers=4, rope_parameters=rope)
    changed = transformers.Gemma3TextConfig(
        num_hidden_layers=4, rope_parameters=rope | {"full_attention": {"rope_type": "default", "rope_theta": 2e6}}
    )
    assert computing_fields(plain)["num_hidden_layers"] == 4
    assert computing_fields(changed)["rope"]["full_attention"] == {"rope_theta": 2000000}
    outer = transformers.Gemma3Config(text_config=plain.to_dict())
    assert computing_fields(outer)["text_config"]["num_hidden_layers"] == 4
    assert computing_fields(outer) != computing_fields(transformers.Gemma3Config(text_config=changed.to_dict()))


def test_kinds_of_blocks_are_the_same_by_their_older_names() -> None:
    config = transformers.Qwen3Config(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    older = transformers.Qwen3Config(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    older.layer_types = ["attention", "sliding_attention"]
    assert computing_fields(older) == computing_fields(config)


# --- the tokenizer


def test_padding_and_truncation_are_no_part_of_a_tokenizer() -> None:
    one, other = tiny.tokenizer(), tiny.tokenizer()
    other("some text", truncation=True, max_length=4, padding="max_length")
    assert tokenizer_hash(one) == tokenizer_hash(other)
    assert tokenizer_hash(one) != tokenizer_hash(tiny.tokenizer(adds_bos=True))


def test_the_template_and_where_generation_ends_count(model: Path) -> None:
    before = identity(model)
    (model / "chat_template.jinja").write_text(tiny.CHAT)
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [2, 5]}))
    now = identity(model)
    assert before.differences(now) == [
        "the chat template is another one",
        "the end-of-sequence tokens were [2] and are [2, 5]",
    ]


# --- the model's own code


def test_remote_code_counts_by_its_files(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "own-code")
    rewrite(
        folder,
        model_type="ours",
        auto_map={"AutoConfig": "configuration_ours.OursConfig", "AutoModelForCausalLM": "modeling_ours.OursModel"},
    )
    config = "from transformers import LlamaConfig\n\n\nclass OursConfig(LlamaConfig):\n    model_type = 'ours'\n"
    (folder / "configuration_ours.py").write_text(config)
    code = (
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_ours import OursConfig\n\n\n"
        "class OursModel(LlamaForCausalLM):\n    config_class = OursConfig\n"
    )
    (folder / "modeling_ours.py").write_text(code)

    def now() -> ModelIdentity:
        return identity_of(load_model(str(folder), dtype="float32", device="cpu", trust_remote_code=True))

    before = now()
    assert before.remote_code is not None
    (folder / "modeling_ours.py").write_text(code + "    SCALE = 2.0\n")
    (folder / "configuration_ours.py").write_text(config + "    # by this transformers distinguishes modules\n")
    assert before.differences(now()) == ["the model's own code is another one"]


# --- runs


@pytest.fixture
def run(model: Path, tmp_path: Path) -> sleb.Run:
    (tmp_path / "text.txt").write_text(tiny.text())
    return sleb.search(
        str(model),
        calibration=str(tmp_path / "text.txt"),
        sequences=4,
        sequence_length=24,
        held_out=2,
        remove=2,
        dtype="float32",
        device="cpu",
        run_dir=tmp_path / "run",
    )


CHANGED = {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}
BASE_CHANGED = r"rope\.rope_theta was 10000 and is 50"


def cut_short(run_dir: Path) -> None:
    """As after a stop in the second step."""
    lines = (run_dir / "trace.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "trace.jsonl").write_text("".join(lines[:2]))


def without_identity(run_dir: Path) -> None:
    """As an earlier version wrote it."""
    path = run_dir / "stack.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("identity", "scoring_version")}
    path.write_text(json.dumps(kept))
    origin.confirm(run_dir)


def test_another_config_is_no_model_to_go_on_with(run: sleb.Run, model: Path, tmp_path: Path) -> None:
    cut_short(run.run_dir)
    rewrite(model, **CHANGED)
    for refused in (
        lambda: sleb.resume(run.run_dir, device="cpu"),
        lambda: sleb.evaluate(run.run_dir, perplexity=[str(tmp_path / "text.txt")], window=32, device="cpu"),
        lambda: sleb.export_model(run.run_dir, tmp_path / "smaller"),
    ):
        with pytest.raises(RunError, match=BASE_CHANGED):
            refused()
    assert len(sleb.load(run.run_dir).require_trace().steps) == 1
    assert not (tmp_path / "smaller").exists()


def test_another_tokenizer_is_no_model_to_go_on_with(run: sleb.Run, model: Path) -> None:
    tiny.tokenizer(adds_bos=True).save_pretrained(str(model))
    with pytest.raises(RunError, match="tokenizer is another one"):
        sleb.export_model(run.run_dir, model.parent / "smaller")


def test_a_search_takes_no_block_outputs_of_another_config(run: sleb.Run, model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(calibration=str(tmp_path / "text.txt"), sequences=4, sequence_length=24, held_out=2)
    settings |= dict(dtype="float32", device="cpu")
    again = sleb.analyze(str(model), run_dir=tmp_path / "again", **settings)
    assert again.analysis is not None
    assert run.analysis is not None
    assert again.analysis.description.cached
    assert again.analysis.description.versions["transformers"] == transformers.__version__
    rewrite(model, **CHANGED)
    changed = sleb.analyze(str(model), run_dir=tmp_path / "changed", **settings)
    assert changed.analysis is not None
    assert not changed.analysis.description.cached
    assert changed.analysis.similarity.metric1 != run.analysis.similarity.metric1


def test_an_evaluation_of_a_model_that_has_changed_is_not_the_one_before(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(tiny.text())
    settings: dict[str, Any] = dict(removal_list=[3], perplexity=[str(tmp_path / "text.txt")], window=32, device="cpu")
    before = sleb.evaluate(str(model), **settings)
    rewrite(model, **CHANGED)
    with pytest.raises(RunError, match=f"{BASE_CHANGED}.*`run_dir`"):
        sleb.evaluate(str(model), **settings)
    after = sleb.evaluate(str(model), run_dir=tmp_path / "apart", **settings)
    assert [each.measured for each in after] != [each.measured for each in before]  # type: ignore[attr-defined]


def test_a_run_without_identity_goes_on_where_its_baseline_agrees(run: sleb.Run) -> None:
    cut_short(run.run_dir)
    without_identity(run.run_dir)
    assert sleb.load(run.run_dir).stack.model_key is None  # type: ignore[union-attr]
    again = sleb.resume(run.run_dir, device="cpu")
    assert again.removal_list == run.removal_list
    assert again.stack == run.stack
    assert origin.is_written_here(run.run_dir)


@pytest.mark.parametrize("tidied", [False, True])
def test_a_run_without_identity_is_refused_where_its_baseline_differs(
    tidied: bool, run: sleb.Run, model: Path, tmp_path: Path
) -> None:
    cut_short(run.run_dir)
    without_identity(run.run_dir)
    if tidied:
        shutil.rmtree(run.run_dir / "scores")
    rewrite(model, **CHANGED)
    before = (run.run_dir / "trace.jsonl").read_bytes()
    for refused in (
        lambda: sleb.resume(run.run_dir, device="cpu"),
        lambda: sleb.evaluate(run.run_dir, perplexity=[str(tmp_path / "text.txt")], window=32, device="cpu"),
    ):
        with pytest.raises(RunError, match=r"scores \d\.\d+ nats per token .* has \d\.\d+: the model's config"):
            refused()
    assert (run.run_dir / "trace.jsonl").read_bytes() == before
    assert sleb.load(run.run_dir).stack.model_key is None  # type: ignore[union-attr]


def test_a_run_of_another_version_of_the_scoring_is_not_resumed(run: sleb.Run) -> None:
    cut_short(run.run_dir)
    stack = run.stack
    assert stack is not None
    origin.write_stack(run.run_dir, stack.model_copy(update={"scoring_version": 99}))
    with pytest.raises(RunError, match="version 99 of the scoring code, and this program has version 1"):
        sleb.resume(run.run_dir, device="cpu")


# --- the hub's commit


def test_the_commit_is_recorded_and_everything_is_of_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache as the hub's library makes it: `main` has moved on since the commit that is asked for again."""
    commits = ["1" * 40, "2" * 40]
    entry = tmp_path / "hub" / "models--owner--tiny"
    for commit in commits:
        shutil.copytree(model, entry / "snapshots" / commit)
        rewrite(entry / "snapshots" / commit, rms_norm_eps=0.1 * int(commit[0]))
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(commits[0])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    first = load_model("owner/tiny", dtype="float32", device="cpu")
    assert first.revision == commits[0]
    (entry / "refs" / "main").write_text(commits[1])
    moved = load_model("owner/tiny", dtype="float32", device="cpu")
    assert moved.revision == commits[1]
    again = load_model("owner/tiny", revision=commits[0], dtype="float32", device="cpu")
    assert again.revision == commits[0]
    assert identity_of(again) == identity_of(first) != identity_of(moved)
    assert load_model(str(model), dtype="float32", device="cpu").revision is None
    (tmp_path / "text.txt").write_text(tiny.text())
    run = sleb.search(
        "owner/tiny",
        calibration=str(tmp_path / "text.txt"),
        sequences=2,
        sequence_length=24,
        held_out=1,
        remove=1,
        analysis=False,
        device="cpu",
        dtype="float32",
        run_dir=tmp_path / "run",
    )
    assert run.stack is not None
    assert run.stack.revision == commits[1]
    rewrite(entry / "snapshots" / commits[1], rms_norm_eps=0.3)
    with pytest.raises(RunError, match=rf"owner/tiny at commit {commits[1]} is not the model .* rms_norm_eps was 0.2"):
        sleb.export_model(run.run_dir, tmp_path / "smaller")
    rewrite(entry / "snapshots" / commits[1], rms_norm_eps=0.2)
    proof = sleb.export_model(run.run_dir, tmp_path / "smaller")
    assert (proof.model, proof.weights_hash) == ("owner/tiny", run.stack.weights_hash)
    assert commits[1] in (tmp_path / "smaller" / "README.md").read_text()
