"""What the exported model is loaded with, and what its proof found about generated text. Knows records and strings."""

from __future__ import annotations

from pathlib import Path

from sleb.records import Proof


def snippet(out: Path) -> str:
    """Python that loads the exported model and generates with it."""
    is_file = out.suffix.lower() == ".gguf"
    arguments = f"folder, gguf_file={out.name!r}" if is_file else "folder"
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"folder = {str(out.parent if is_file else out)!r}\n"
        f"model = AutoModelForCausalLM.from_pretrained({arguments})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({arguments})\n"
        'ids = tokenizer("The Earth is", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0]))\n"
    )


def generation(proof: Proof) -> str:
    """A sentence, without its full stop, that compares what the exported model and the baseline generated."""
    if proof.generated_with_cache == proof.generated_without_cache == proof.generated_by_skipping:
        return (
            f"{proof.generated_tokens} greedily generated tokens are equal with the KV cache, without it, and from the "
            "baseline with the blocks skipped"
        )
    return (
        f"Of {proof.generated_tokens} greedily generated tokens some differ, where two were equally likely or where "
        "the baseline, too, generates other tokens with the KV cache than without"
    )
