"""Random tiny decoder-only language models, one per family: the table every per-family test walks.

Knows how to configure and build them; never loads weights, never touches the network. Where a family has
several kinds of blocks (sliding and full attention, mixture and dense, recurrent and attention) they mix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HIDDEN = 32
HEADS = 4
KV_HEADS = 2
VOCAB = 128
POSITIONS = 128
WINDOW = 4  # tokens; shorter than the sequences of token_ids(), so a wrong mask shows in the logits
EXPERTS = 4
FIRST_ORDINARY_TOKEN = 3  # 0, 1, 2 are pad, bos, eos

MATRIX_GAIN = 0.7  # standard deviation of a weight matrix is MATRIX_GAIN / sqrt(inputs)
EMBEDDING_STD = 0.7
JITTER = 0.1  # added to every vector: biases stop being zero, norm scales stop being one


@dataclass(frozen=True)
class Family:
    """How to configure a tiny model of one family."""

    config: Callable[[int], PreTrainedConfig]  # num_blocks -> config; imports transformers when called
    notes: str = ""


def _cycle(pattern: Sequence[Any]) -> Callable[[int], list[Any]]:
    """A setting with an entry for each block, in a pattern that repeats."""
    return lambda num_blocks: [pattern[i % len(pattern)] for i in range(num_blocks)]


def _below(*indices: int) -> Callable[[int], list[int]]:
    """A setting that lists those of some blocks that there are."""
    return lambda num_blocks: [index for index in indices if index < num_blocks]


def _family(class_name: str, notes: str, blocks: str | None, settings: dict[str, Any]) -> Family:
    """A family by its settings; those that are functions depend on the number of blocks, whose setting is `blocks`."""

    def config(num_blocks: int) -> PreTrainedConfig:
        import transformers

        own = {name: value(num_blocks) if callable(value) else deepcopy(value) for name, value in settings.items()}
        own |= {blocks: num_blocks} if blocks else {}
        return getattr(transformers, class_name)(pad_token_id=0, bos_token_id=1, eos_token_id=2, **own)

    return Family(config, notes)


def _plain(class_name: str, notes: str = "", **settings: Any) -> Family:
    """A family whose settings have the names that Llama gave them."""
    defaults = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=POSITIONS,
    )
    return _family(class_name, notes, "num_hidden_layers", defaults | settings)


def _typed(class_name: str, pattern: Sequence[str], notes: str = "", **settings: Any) -> Family:
    """A family whose blocks are of the kinds in `layer_types`."""
    return _plain(class_name, notes, layer_types=_cycle(pattern), **settings)


def _own(
    class_name: str,
    notes: str = "",
    *,
    blocks: str | None = "num_hidden_layers",
    hidden: str = "hidden_size",
    heads: str | None = "num_attention_heads",
    positions: str | None = "max_position_embeddings",
    **settings: Any,
) -> Family:
    """A family that names its sizes in its own way, or (None) has no setting for one."""
    sizes = {hidden: HIDDEN, heads: HEADS, positions: POSITIONS}
    return _family(
        class_name,
        notes,
        blocks,
        {"vocab_size": VOCAB} | {name: size for name, size in sizes.items() if name} | settings,
    )


SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
MIXED = (SLIDING, FULL, FULL, SLIDING, SLIDING, FULL)  # irregular: no period survives a removal by luck

_MAMBA2 = dict(
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_n_groups=1,
    mamba_d_state=8,
    mamba_d_conv=4,
    mamba_expand=2,
    mamba_chunk_size=8,
)
_GEMMA4 = dict(
    head_dim=8,
    global_head_dim=16,
    vocab_size_per_layer_input=VOCAB,
    hidden_size_per_layer_input=8,
    sliding_window=WINDOW,
)

FAMILIES: dict[str, Family] = {
    # blocks of one kind
    "llama": _plain("LlamaConfig"),
    "mistral": _plain("MistralConfig", "every block slides", sliding_window=WINDOW),
    "mixtral": _plain("MixtralConfig", "every block is a mixture", num_local_experts=EXPERTS, num_experts_per_tok=2),
    "gemma": _plain("GemmaConfig", head_dim=8),
    "opt": _own("OPTConfig", ffn_dim=2 * HIDDEN, word_embed_proj_dim=HIDDEN),
    "gpt2": _own("GPT2Config", blocks="n_layer", hidden="n_embd", heads="n_head", positions="n_positions"),
    "gptj": _own(
        "GPTJConfig", blocks="n_layer", hidden="n_embd", heads="n_head", positions="n_positions", rotary_dim=4
    ),
    "gpt-neox": _plain("GPTNeoXConfig", num_key_value_heads=HEADS),
    "phi": _plain("PhiConfig"),
    "phi3": _plain("Phi3Config", sliding_window=WINDOW),
    "bloom": _own("BloomConfig", "alibi", blocks="n_layer", heads="n_head", positions=None),
    "falcon": _own("FalconConfig", num_kv_heads=KV_HEADS, new_decoder_architecture=True),
    "falcon-alibi": _own("FalconConfig", multi_query=True, alibi=True),
    "mpt": _own("MptConfig", "alibi", blocks="n_layers", hidden="d_model", heads="n_heads", positions="max_seq_len"),
    "stablelm": _plain("StableLmConfig"),
    "olmo2": _plain("Olmo2Config"),
    "granite": _plain(
        "GraniteConfig",
        embedding_multiplier=1.5,
        logits_scaling=0.8,
        residual_multiplier=0.7,
        attention_multiplier=0.4,
    ),
    "mamba": _own("MambaConfig", "recurrent, no attention", heads=None, positions=None, state_size=8),
    "mamba2": _own(
        "Mamba2Config",
        "recurrent, no attention",
        heads=None,
        positions=None,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=1,
        chunk_size=8,
    ),
    "falcon-h1": _plain(
        "FalconH1Config",
        "attention and Mamba side by side in every block",
        mamba_d_ssm=64,
        head_dim=8,
        **_MAMBA2,
    ),
    # sliding and full attention mixed
    "qwen2": _typed("Qwen2Config", MIXED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3": _typed("Qwen3Config", MIXED, head_dim=8, use_sliding_window=True, sliding_window=WINDOW),
    "gemma2": _typed("Gemma2Config", MIXED, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW),
    "gemma3": _typed("Gemma3TextConfig", MIXED, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW),
    "gemma4": _typed(
        "Gemma4TextConfig",
        MIXED,
        "per-layer inputs from one packed table; larger heads in full attention; the last block must be full",
        **_GEMMA4,
    ),
    "gemma4-shared-kv": _typed(
        "Gemma4TextConfig",
        (SLIDING, FULL),
        "the last third reuses keys and values of earlier blocks: blocks are not independent of each other",
        num_kv_shared_layers=lambda n: n // 3,
        **_GEMMA4,
    ),
    "gemma4-moe": _typed(
        "Gemma4TextConfig",
        MIXED,
        enable_moe_block=True,
        num_experts=EXPERTS,
        top_k_experts=2,
        moe_intermediate_size=HIDDEN,
        **(_GEMMA4 | dict(hidden_size_per_layer_input=0)),
    ),
    "cohere2": _typed(
        "Cohere2Config",
        MIXED,
        "full attention without rotary positions",
        sliding_window=WINDOW,
        logit_scale=0.5,
    ),
    "olmo3": _typed("Olmo3Config", MIXED, sliding_window=WINDOW),
    "gpt-oss": _typed(
        "GptOssConfig",
        MIXED,
        head_dim=8,
        sliding_window=WINDOW,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0),
    ),
    "laguna": _typed(
        "LagunaConfig",
        MIXED,
        "three lists: attention, mixture and heads per block",
        mlp_layer_types=_cycle(("dense", "sparse", "sparse")),
        num_attention_heads_per_layer=_cycle((4, 4, 2, 4, 2, 2)),
        head_dim=8,
        sliding_window=WINDOW,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=HIDDEN,
        shared_expert_intermediate_size=HIDDEN,
    ),
    "gpt-neo": _own(
        "GPTNeoConfig",
        "kinds written twice: attention_types and attention_layers",
        blocks="num_layers",
        heads="num_heads",
        intermediate_size=2 * HIDDEN,
        window_size=WINDOW,
        attention_types=lambda n: [[_cycle(("global", "local", "local"))(n), 1]],
    ),
    "smollm3": _plain(
        "SmolLM3Config",
        "blocks without rotary positions slide",
        no_rope_layers=_cycle((1, 0, 1, 1, 1, 0)),
        use_sliding_window=True,
        sliding_window=WINDOW,
    ),
    "llama4": _plain(
        "Llama4TextConfig",
        "text model; mixture blocks by index list; chunked attention where there are rotary positions",
        head_dim=8,
        intermediate_size_mlp=2 * HIDDEN,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        moe_layers=_below(1, 2, 4),
        no_rope_layers=_cycle((1, 0, 1, 1, 0, 1)),
        attention_chunk_size=WINDOW,
        floor_scale=4,
    ),
    # mixture and dense blocks mixed
    "qwen3-moe": _plain(
        "Qwen3MoeConfig",
        "dense blocks by index list",
        head_dim=8,
        moe_intermediate_size=HIDDEN,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        mlp_only_layers=[0, 3, 4],
    ),
    "qwen2-moe": _plain(
        "Qwen2MoeConfig",
        "mixture blocks by period (decoder_sparse_step=2)",
        moe_intermediate_size=HIDDEN,
        shared_expert_intermediate_size=HIDDEN,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        decoder_sparse_step=2,
    ),
    "ernie4.5-moe": _plain(
        "Ernie4_5_MoeConfig",
        "mixture blocks by period inside a range of indices",
        head_dim=8,
        moe_intermediate_size=HIDDEN,
        moe_num_experts=EXPERTS,
        moe_k=2,
        moe_layer_start_index=1,
        moe_layer_end_index=4,
        moe_layer_interval=2,
    ),
    "deepseek-v3": _plain(
        "DeepseekV3Config",
        "dense blocks by count from the start",
        num_key_value_heads=HEADS,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=2,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    # recurrent or convolutional and attention blocks mixed
    "lfm2": _typed(
        "Lfm2Config",
        ("conv", FULL, FULL, "conv", "conv", FULL),
        block_multiple_of=8,
        block_auto_adjust_ff_dim=False,
    ),
    "jamba": _plain(
        "JambaConfig",
        "attention and mixture blocks by period: the kinds cannot be listed",
        attn_layer_period=3,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "bamba": _plain("BambaConfig", "attention blocks by index list", attn_layer_indices=_below(1, 2, 5), **_MAMBA2),
    "granite-moe-hybrid": _typed(
        "GraniteMoeHybridConfig",
        (LINEAR, FULL, FULL, LINEAR, LINEAR, FULL),
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        shared_intermediate_size=HIDDEN,
        position_embedding_type="rope",
        **_MAMBA2,
    ),
    "qwen3-next": _typed(
        "Qwen3NextConfig",
        (LINEAR, FULL, FULL, LINEAR, LINEAR, FULL),
        "gated delta net and attention; dense blocks by index list",
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=HIDDEN,
        shared_expert_intermediate_size=HIDDEN,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        mlp_only_layers=[1, 3],
    ),
    "recurrent-gemma": _plain(
        "RecurrentGemmaConfig",
        "attention by a repeated pattern (block_types)",
        num_key_value_heads=1,
        lru_width=HIDDEN,
        attention_window_size=WINDOW,
        block_types=["recurrent", "attention"],
    ),
    "nemotron-h": _own(
        "NemotronHConfig",
        "every block is one of Mamba, attention, mixture, MLP; num_hidden_layers follows layers_block_type",
        blocks=None,
        positions=None,
        intermediate_size=2 * HIDDEN,
        layers_block_type=_cycle((LINEAR, "moe", FULL, "mlp")),
        num_key_value_heads=KV_HEADS,
        head_dim=8,
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=1,
        chunk_size=8,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=HIDDEN,
        moe_shared_expert_intermediate_size=HIDDEN,
        use_mamba_kernels=False,
    ),
    "zamba2": _plain(
        "Zamba2Config",
        "hybrid blocks share one transformer and also read the embeddings; needs two blocks or more",
        layers_block_type=_cycle((LINEAR, "hybrid", LINEAR)),
        num_key_value_heads=HEADS,
        attention_head_dim=16,
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_headdim=8,
        mamba_ngroups=1,
        chunk_size=8,
        num_mem_blocks=1,
        adapter_rank=4,
    ),
    # blocks that are not just hidden state in, hidden state out
    "gemma3n": _typed(
        "Gemma3nTextConfig",
        MIXED,
        "hidden state is (4, batch, sequence, hidden); with three blocks other lists are as long",
        activation_sparsity_pattern=_cycle((0.5, 0.5, 0.0)),
        intermediate_size=_cycle((64, 64, 32)),
        num_kv_shared_layers=0,
        head_dim=8,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        sliding_window=WINDOW,
    ),
    "glm-moe-dsa": _plain(
        "GlmMoeDsaConfig",
        "a block hands its sparse attention indices to the next, as the second element of its output",
        mlp_layer_types=_cycle(("dense", "sparse", "sparse")),
        indexer_types=_cycle(("full", "shared", "full")),
        num_key_value_heads=HEADS,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        index_head_dim=16,
        index_n_heads=2,
        index_topk=WINDOW,
    ),
    "rwkv": _own(
        "RwkvConfig",
        "the model halves the hidden state between blocks; needs two blocks or more",
        heads=None,
        positions=None,
        rescale_every=2,
    ),
    # the index is mathematics
    "gpt2-inverse-index": _own(
        "GPT2Config",
        "attention divided by layer_idx + 1: the index is mathematics",
        blocks="n_layer",
        hidden="n_embd",
        heads="n_head",
        positions="n_positions",
        scale_attn_by_inverse_layer_idx=True,
    ),
    "diffllama": _plain("DiffLlamaConfig", "lambda_init is computed from layer_idx"),
    "minimax": _typed(
        "MiniMaxConfig",
        (LINEAR, FULL, FULL),
        "linear attention decays by layer_idx and num_hidden_layers, in buffers a checkpoint holds",
        head_dim=8,
        block_size=8,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    ),
}


def build(name: str, num_blocks: int = 6, seed: int = 0) -> PreTrainedModel:
    """The family's tiny model: float32, eval mode, weights that depend on the seed alone."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(FAMILIES[name].config(num_blocks), dtype=torch.float32)
        _randomise(model)
    return model.eval()


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Weights strong enough that no block is nearly the identity, whatever the family's initialisation."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            weight.add_(JITTER * torch.randn(weight.shape))
        elif id(weight) in embeddings:
            weight.normal_(std=EMBEDDING_STD)
        elif not name.endswith("A_log"):  # Mamba's decay rates keep their scale
            weight.normal_(std=MATRIX_GAIN * weight.shape[-1] ** -0.5)
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():  # per-block scales and router biases, so that a lost one shows
        if name in saved and buffer.is_floating_point() and buffer.ndim == 1:
            buffer.add_(JITTER * torch.randn(buffer.shape))


def token_ids(model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0) -> torch.LongTensor:
    """Random ordinary tokens (no pad, bos or eos), shape (batch, length)."""
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_ORDINARY_TOKEN, vocab_size, (batch, length), generator=generator)
