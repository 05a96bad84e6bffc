"""Commands that write what a run found: export, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sleb import api
from sleb.cli.foreground import confirm_names
from sleb.cli.options import (
    AllowPickle,
    Device,
    Format,
    Json,
    MemoryBudget,
    RunName,
    TrustPaths,
    TrustRemoteCode,
    as_bytes,
)
from sleb.cli.output import put, say
from sleb.cli.terminal import Screen, table
from sleb.errors import OptionError, Stopped
from sleb.export.destination import save_text
from sleb.runtime import run_folder


def export(
    run: RunName,
    format: Annotated[
        Format,
        typer.Option("--format", "-f", help="hf and gguf write the smaller model and prove it; the others, the list."),
    ] = Format.JSON,
    steps: Annotated[int | None, typer.Option(min=1, help="The list after so many steps. [default: all]")] = None,
    out: Annotated[Path | None, typer.Option(help="File, or folder for hf. [default: stdout]")] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A GGUF file of the model, for gguf. [default: the model, if it is one]"),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="What an earlier export left at --out may go.")] = False,
    device: Device = "cpu",
    memory_budget: MemoryBudget = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    trust_paths: TrustPaths = False,
    as_json: Json = False,
) -> None:
    """Take the removal list away, or the smaller model itself.

    **hf**: safetensors with the blocks really gone, reloaded in a fresh process and compared with the
    original before the folder appears. **gguf**: the same for a GGUF file; the weights that stay are copied
    as they are. **mergekit**: a passthrough merge. **llama-quantize**: for llama.cpp's own tool. **sleb**:
    the reference's own option.
    """
    from sleb.formats.list_formats import remarks, render

    found = run_folder.load(run)
    if gguf is not None and format is not Format.GGUF:
        raise OptionError("--gguf names the file that --format gguf cuts; add that, or leave it out.")
    if format not in (Format.HF, Format.GGUF):
        text = render(found, format.value, steps)
        for remark in remarks(found, format.value):
            say(remark)
        if out is not None:
            save_text(out, text, replace=replace)
            say(f"Wrote {out}.")
        if as_json:
            taken = list(found.removal_list_after(steps))
            put(json.dumps({"format": format.value, "removal_list": taken, "text": text}))
        elif out is None:
            put(text, newline=False)
        return
    if out is None:
        what = "a folder" if format is Format.HF else "a file"
        raise OptionError(f"--format {format.value} writes {what}: name it with --out.")
    confirm_names(found, trust_paths)
    with Screen(as_json) as screen:
        try:
            proof = api.export_model(
                found,
                out,
                format="gguf" if format is Format.GGUF else "hf",
                gguf=gguf,
                steps=steps,
                replace=replace,
                device=device,
                memory_budget=as_bytes(memory_budget),
                allow_pickle=allow_pickle,
                trust_remote_code=trust_remote_code,
                trust_paths=True,
                watcher=screen.watcher(),
            )
        except (KeyboardInterrupt, Stopped) as stopped:
            raise Stopped(f"Stopped; nothing was written to {out}.") from stopped
    if as_json:
        put(proof.model_dump_json())
        return
    table(
        f"Wrote and proved {out}",
        ("", "before", "after"),
        [
            ("blocks", str(proof.blocks_before), str(proof.blocks_after)),
            ("parameters", f"{proof.parameters_before:,}", f"{proof.parameters_after:,}"),
            *(
                [("megabytes", f"{proof.bytes_before / 1e6:,.1f}", f"{proof.bytes_after / 1e6:,.1f}")]
                if proof.bytes_before is not None
                else []
            ),
        ],
    )
    put(
        f"Reloaded in a fresh process: logits of {proof.tokens} tokens differ by at most "
        f"{proof.max_logit_difference:.2g} (allowed {proof.tolerance:.2g}), {proof.generated_tokens} tokens generated "
        "equal with and without cache."
    )
    if proof.checked:
        put(f"Compared, too: {'; '.join(proof.checked)}.")


def report(
    run: RunName,
    out: Annotated[Path, typer.Option(help="The file to write, such as report.html.")],
    steps: Annotated[int | None, typer.Option(min=1, help="The list after so many steps. [default: all]")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="A file that is there already may go.")] = False,
) -> None:
    """Write a run as one HTML file to hand to a colleague: evidence, charts, list; needs no network to be read."""
    found = api.load(run)
    found.removal_list_after(steps)  # refused before anything is drawn
    from sleb.report import build  # plotly takes a second to import

    save_text(out, build.of(found, steps), replace=replace)
    say(f"Wrote {out}.")
