"""Removing blocks in memory: equal to skipping them, or refused with the reason, whatever the family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig

from sleb.errors import ExportError
from sleb.export.config_periods import broken_periods
from sleb.export.removal import plan_removal, remove_blocks
from sleb.export.smaller_config import readings, streamlined_config
from sleb.model.block_stack import BlockStack
from tests.support.families import FAMILIES, build, token_ids

REFUSED = {
    ("diffllama", (1, 3)): r"block 2 would change as block 1: self_attn\.lambda_init is 0\.47",
    ("gpt2-inverse-index", (2,)): r"block 3 would change as block 2: attn\.scaling",
    ("jamba", (2,)): r"by a period \(.*attn_layer_period=3.*no period gives the kinds",
    ("ernie4.5-moe", (2,)): r"mlp is Ernie4_5_MoeSparseMoeBlock and would be Ernie4_5_MoeMLP",
    ("zamba2", (1,)): r"would be absent",
    ("gemma4", (5,)): r"turns layer_types of the blocks that stay, .* into",
    ("gemma4-shared-kv", (2,)): r"store_full_length_kv is False and would be True",
}


@pytest.mark.parametrize(("case", "reason"), REFUSED.items(), ids=str)
def test_what_a_config_cannot_express_is_refused_with_its_reason(
    case: tuple[str, tuple[int, ...]], reason: str
) -> None:
    model = build(case[0])
    ids = token_ids(model)
    with torch.inference_mode():
        before = BlockStack(model).forward(ids)
    with pytest.raises(ExportError, match=reason) as raised:
        remove_blocks(model, case[1])
    assert "cannot be saved without blocks" in str(raised.value)
    with torch.inference_mode():
        assert torch.equal(before, BlockStack(model).forward(ids))  # nothing was touched


@pytest.mark.parametrize("removal_list", [(0,), (5,), (1, 3), (3, 1), (0, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4", "qwen3-next", "falcon", "mpt", "olmo3", "granite"])
def test_removing_equals_skipping(name: str, removal_list: tuple[int, ...]) -> None:
    model = build(name)
    if (name, removal_list) == ("gemma4", (5,)):  # its last block must be one of full attention: see REFUSED
        removal_list = (4,)
    ids = token_ids(model)
    stack = BlockStack(model)
    with torch.inference_mode(), stack.skipping(removal_list):
        expected = stack.forward(ids)
    untouched = copy.deepcopy(model.config.to_dict())
    config = model.config
    remove_blocks(model, removal_list)
    assert config.to_dict() == untouched  # replaced, not changed: others may hold it
    assert model.config.num_hidden_layers == len(stack.blocks) == 6 - len(removal_list)
    with torch.inference_mode():
        result = model(input_ids=ids, use_cache=False).logits
    # Gemma 4's packed per-layer inputs come from a smaller matrix product, which may round otherwise.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4 if name == "gemma4" else 0)


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt-neo", "falcon-h1", "mamba", "rwkv", "gemma3", "lfm2", "jamba"])
def test_layer_indices_are_renumbered(name: str) -> None:
    model = build(name)
    path = plan_removal(model, (1, 3)).path
    remove_blocks(model, (1, 3))
    blocks = model.get_submodule(path)
    result: set[int] = set()
    for position, block in enumerate(blocks):
        for module in block.modules():
            index = getattr(module, "layer_idx", getattr(module, "layer_id", None))
            if index is not None:
                assert index == position
                result.add(index)
    assert result == {0, 1, 2, 3}


def test_lists_counts_and_indices_of_the_config_follow() -> None:
    config = streamlined_config(build("qwen3-moe").config, (1, 3))
    assert config.mlp_only_layers == [0, 2]  # [0, 3, 4]
    config = streamlined_config(build("deepseek-v3").config, (1, 3))
    assert config.first_k_dense_replace == 1  # 2
    qwen2 = build("qwen2").config
    config = streamlined_config(qwen2, (1, 3))
    assert config.layer_types == [qwen2.layer_types[block] for block in (0, 2, 4, 5)]
    assert config.max_window_layers == 1  # 2
    config = streamlined_config(build("llama4").config, (1, 3))
    assert config.moe_layers == [1, 2]  # [1, 2, 4]
    assert config.no_rope_layers == [1, 1, 0, 1]
    config = streamlined_config(build("qwen2-moe").config, (0,))  # sparse: 1, 3, 5
    assert (config.decoder_sparse_step, config.mlp_only_layers) == (1, [1, 3])
    config = streamlined_config(build("jamba").config, (0, 3))  # attention at 1 and 4, mixtures at 1, 3 and 5
    assert config.layer_types == ["full_attention", "linear_attention", "full_attention", "linear_attention"]
    assert config.layers_num_experts == [4, 1, 1, 4] or pytest.fail(str(config.layers_num_experts))
    config = streamlined_config(build("gpt-neo").config, (0,))
    assert config.attention_types == [[["local", "local", "global", "local", "local"], 1]]
    assert config.attention_layers == ["local", "local", "global", "local", "local"]
    gemma4 = build("gemma4").config
    full = {block for block, kind in enumerate(gemma4.layer_types) if kind == "full_attention"}
    overrides = streamlined_config(gemma4, (0,)).to_dict()["per_layer_config"]
    assert {int(block) + 1 for block in overrides} == full


LISTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "that count from one, named by one that none has": (
        {"plan": {"deep": {"full_layers": [2, 3, 6]}}},
        {"plan": {"deep": {"full_layers": [2, 4]}}},
    ),
    "of a kind, whatever they are called": ({"global_attention": [1, 2, 5]}, {"global_attention": [1, 3]}),
    "in a list of settings": (
        {"parts": [{"layers": [0, 1, 2]}, {"layers": [3, 4, 5]}]},
        {"parts": [{"layers": [0, 1]}, {"layers": [2, 3]}]},
    ),
    "in a text": ({"moe_layers_enum": "0,2,3, 5"}, {"moe_layers_enum": "0,1,3"}),
    "with entries for further blocks": (
        {"num_nextn_predict_layers": 1, "per_layer_kind": list("abcdefg"), "sparse_layers": [0, 4, 6]},
        {"num_nextn_predict_layers": 1, "per_layer_kind": list("acefg"), "sparse_layers": [0, 2, 4]},
    ),
    "that name each block once between them": (
        {"one": {"kda_layers": [1, 2, 4], "mla_layers": [3, 5, 6]}},
        {"one": {"kda_layers": [1], "mla_layers": [2, 3, 4]}},
    ),
    "by keys": ({"layer_gain": {"0": 1.0, "3": 2.0, "4": 3.0}}, {"layer_gain": {"0": 1.0, "2": 3.0}}),
    "of another part": (
        {"vision_tower": {"layers": [1, 3]}, "block_size": 6, "stop_ids": [1, 2]},
        {"vision_tower": {"layers": [1, 3]}, "block_size": 6, "stop_ids": [1, 2]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LISTS)
def test_lists_of_blocks_follow_wherever_they_stand(case: str) -> None:
    """Settings that the class does not know, as those of a model's own code, in a stack of mixed kinds."""
    given, expected = LISTS[case]
    config = build("qwen3").config
    for name, value in given.items():
        setattr(config, name, value)
    result = streamlined_config(config, (1, 3)).to_dict()
    assert {name: result[name] for name in expected} == expected


def test_a_list_that_nothing_explains_is_refused_where_it_matters() -> None:
    model = build("llama")
    model.config.special = {"layers": [2, 4]}
    with pytest.raises(ExportError, match=r"special\.layers in its config .* count from 0 or from 1"):
        plan_removal(model, (1, 3))
    assert plan_removal(model, (5,)).skeleton.config.special == {"layers": [2, 4]}  # either way
    model.config.special = {"layers": [0, 4]}
    assert plan_removal(model, (1, 3)).skeleton.config.special == {"layers": [0, 2]}
    model.config.special = {"layers": [2, 6]}
    assert plan_removal(model, (1, 3)).skeleton.config.special == {"layers": [4]}


def test_a_period_that_no_longer_holds_is_told() -> None:
    config = FAMILIES["smollm3"].config(6)
    config.no_rope_layers, config.no_rope_layer_interval = [1, 1, 0, 1, 1, 0], 3
    assert broken_periods(config, streamlined_config(config, (1,))) == {"no_rope_layer_interval": "no_rope_layers"}
    assert broken_periods(config, streamlined_config(config, (3, 4, 5))) == {}
    config.no_rope_layer_interval = 5  # it said nothing before
    assert broken_periods(config, streamlined_config(config, (1,))) == {}


def test_a_list_that_the_model_itself_uses_explains_itself() -> None:
    model = build("qwen3-moe")
    model.config.mlp_only_layers = [3, 4]  # from nought: blocks 3 and 4 are dense, as their modules show
    config = FAMILIES["qwen3-moe"].config(6)
    config.mlp_only_layers = [3, 4]
    model = type(model)._from_config(config).eval()
    assert plan_removal(model, (1,)).skeleton.config.mlp_only_layers == [2, 3]


def test_a_false_friend_is_left_alone() -> None:
    """A list as long as the stack that is not about blocks: Mamba 2's time_step_limit in a stack of two."""
    config = build("mamba2", num_blocks=2).config
    assert len(config.time_step_limit) == 2
    removal = plan_removal(build("mamba2", num_blocks=2), (0,))
    assert list(removal.skeleton.config.time_step_limit) == list(config.time_step_limit)


def test_an_index_list_as_long_as_the_stack_is_renumbered() -> None:
    config = Qwen3MoeConfig(num_hidden_layers=4, mlp_only_layers=[0, 1, 2, 3])
    assert next(readings(config, (1,)))["mlp_only_layers"] == [0, 1, 2]


def test_a_family_nobody_thought_of_is_refused_by_what_it_does() -> None:
    """An attribute that follows the index as no config can tell: found without knowing its name."""

    class Odd(type(build("llama"))):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for index, block in enumerate(self.model.layers):
                block.mlp.temperature = 1.0 / (1 + index)

    odd = Odd(build("llama").config)
    with pytest.raises(
        ExportError, match=r"block 2 would change as block 1: mlp\.temperature is 0\.333\d* and would be 0\.5"
    ):
        remove_blocks(odd, (1,))
    remove_blocks(odd, (5,))
    assert len(odd.model.layers) == 5


def test_a_quantised_model_is_refused() -> None:
    class Packed(torch.nn.Linear):
        pass

    model = build("llama")
    packed = Packed(1, 1)
    packed.weight = torch.nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.gate_proj = packed
    with pytest.raises(ExportError, match=r"is quantised \(.*mlp.gate_proj is Packed .*load it without quantisation"):
        remove_blocks(model, (1,))
