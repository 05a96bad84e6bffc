"""Folders of tiny models with what published ones hold besides: further blocks, other types, files of all kinds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support import tiny
from tests.support.families import build

Tensors = dict[str, torch.Tensor]


def save(folder: Path, model: Any, **options: Any) -> Path:
    """A model with a tokenizer, as a Hugging Face folder."""
    model.save_pretrained(str(folder), **options)
    tiny.tokenizer().save_pretrained(str(folder))
    return folder


def settings(folder: Path, *without: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a folder, changed if asked."""
    path = folder / "config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name not in without} | changes
    path.write_text(json.dumps(config))
    return dict(config)


def tensors(folder: Path) -> Tensors:
    """All that the folder's safetensors files hold."""
    weights: Tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        weights |= load_file(path)
    return weights


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors of a folder with one file."""
    changed = {name: tensor.contiguous() for name, tensor in change(tensors(folder)).items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def with_further_blocks(folder: Path) -> Path:
    """DeepSeek's layout: six blocks and two behind them; float16 with norms in float32, and no type in the config."""
    save(folder, build("deepseek-v3").to(torch.float16))

    def change(weights: Tensors) -> Tensors:
        last = {name: tensor for name, tensor in weights.items() if ".layers.5." in name}
        for number in (6, 7):
            weights |= {name.replace(".5.", f".{number}."): torch.randn_like(each) for name, each in last.items()}
        weights["model.layers.6.eh_proj.weight"] = torch.randn(32, 64).half()
        return {name: tensor.float() if "norm" in name else tensor for name, tensor in weights.items()}

    rewrite(folder, change)
    settings(folder, "dtype", num_nextn_predict_layers=2)
    return folder


def kimi_linear(folder: Path) -> Path:
    """As published: the kinds of its eight blocks stand in two nested lists that count from one."""
    import transformers

    config = transformers.KimiLinearConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, moe_intermediate_size=16, kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, num_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
        linear_attn_config=dict(
            kda_layers=[1, 2, 3, 5, 6, 7], full_attn_layers=[4, 8], num_heads=4, head_dim=8, short_conv_kernel_size=4
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    save(folder, transformers.AutoModelForCausalLM.from_config(config).eval())
    settings(folder, "layer_types", "mlp_layer_types", first_k_dense_replace=1)
    return folder


def with_own_code(folder: Path) -> Path:
    """A Llama that brings code of its own, and settings that nobody else knows."""
    save(folder, build("llama"))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    settings(
        folder,
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        architectures=["OwnModel"],
        attention_plan={"global_layers": [0, 3, 5]},
        moe_layers_enum="0,2,5",
    )
    return folder


def in_fp8(folder: Path) -> Path:
    """Stored in eight bits with scales for each square of weights, and dequantised when it is loaded."""
    save(folder, build("llama").to(torch.bfloat16))

    def change(weights: Tensors) -> Tensors:
        changed: Tensors = {}
        for name, tensor in weights.items():
            if tensor.ndim == 2 and ".layers." in name:
                changed[name] = tensor.to(torch.float8_e4m3fn)
                squares = [(size + 15) // 16 for size in tensor.shape]
                changed[name.replace(".weight", ".weight_scale_inv")] = torch.full(squares, 1.5)
            else:
                changed[name] = tensor
        return changed

    rewrite(folder, change)
    settings(
        folder,
        quantization_config=dict(
            quant_method="fp8",
            weight_block_size=[16, 16],
            activation_scheme="dynamic",
            modules_to_not_convert=["lm_head", "model.layers.1.no_such", "model.layers.4.no_such"],
            dequantize=True,
        ),
    )
    return folder


def seeing(folder: Path) -> Path:
    """A text model of six blocks that sees images, named as it was published first, with its processors' files."""
    import transformers

    text = transformers.Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16,
    )  # fmt: skip
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2, image_size=28, patch_size=7
    )
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=120
    )
    torch.manual_seed(0)
    save(folder, transformers.Gemma3ForConditionalGeneration(config).to(torch.bfloat16).eval())
    old = {"model.language_model.": "language_model.model.", "model.vision": "vision", "model.multi": "multi"}

    def change(weights: Tensors) -> Tensors:
        for new, before in old.items():
            weights = {name.replace(new, before): tensor for name, tensor in weights.items()}
        return weights

    rewrite(folder, change)
    processor = getattr(transformers, "Gemma3ImageProcessorPil", transformers.Gemma3ImageProcessor)
    processor(size={"height": 28, "width": 28}).save_pretrained(str(folder))
    (folder / "processor_config.json").write_text('{"image_seq_length": 4, "processor_class": "Gemma3Processor"}')
    (folder / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "tokenizer.model").write_bytes(b"\x00\x01pieces")
    return folder


def text_part(folder: Path) -> Path:
    """A checkpoint that sees images, of which transformers loads the text part alone."""
    import transformers

    text = transformers.Qwen3_5TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
    )  # fmt: skip
    config = transformers.Qwen3_5Config(
        text_config=text.to_dict(),
        vision_config=dict(depth=6, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32),
    )
    torch.manual_seed(0)
    save(folder, transformers.Qwen3_5ForConditionalGeneration(config).eval())
    rewrite(folder, lambda weights: weights | {"mtp.layers.0.fc.weight": torch.randn(3, 3)})
    return folder


def with_odd_files(folder: Path, outside: Path) -> None:
    """Put into a folder what must not be carried over, and what must."""
    for name, content in {
        "LICENSE": "as is", "README.md": "# The base model", "vocab.json": '{"layers.3": 1}', "own.py": "print()",
        "preprocessor.json": '{"auto_map": {"AutoProcessor": "own.P"}, "size": 3}', "run.sh": "true",
        "pytorch_model.bin": "weights", "params.json": '{"n_layers": 6}', "recipe.yaml": "targets: [re:.*layers.3.*]",
        ".gitattributes": "", "proof.json": "{}", "two\nlines.txt": "", "other.safetensors": "",
        "notes.json": '{"n_layers": 5}',
    }.items():  # fmt: skip
        (folder / name).write_text(content)
    for name in ("onnx", "additional_chat_templates"):
        (folder / name).mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "additional_chat_templates" / "tools.sh").write_text("true")
    outside.write_text("secret")
    (folder / "link.txt").symlink_to(outside)
    (folder / "lost.txt").symlink_to(folder / "nowhere.txt")
    (folder / "round.txt").symlink_to(folder / "round.txt")
    (folder / "imatrix.dat").write_bytes(b"statistics of each block")
    (folder / "licence.txt").symlink_to(folder / "LICENSE")
    os.mkfifo(folder / "pipe.txt")
    with open(folder / "long.txt", "wb") as file:
        file.truncate((256 << 20) + 1)
