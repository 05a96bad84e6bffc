"""Commands that write what a run found: export, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from sleb import api
from sleb.cli.foreground import confirm_names
from sleb.cli.groups import grouped
from sleb.cli.options import Allowed, Device, Json, MemoryBudget, RunName, as_bytes
from sleb.cli.output import put, say
from sleb.cli.terminal import Screen, table
from sleb.errors import OptionError, Stopped
from sleb.export.destination import save_text
from sleb.formats.list_formats import remarks, render
from sleb.records import Proof, Run
from sleb.runtime import run_folder

Format = Literal["json", "csv", "list", "sleb", "mergekit", "llama-quantize", "hf", "gguf"]


@grouped
def export(
    run: RunName,
    allowed: Allowed,
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            "-f",
            help="What to write: hf and gguf are the smaller model, with its proof; the others are the list.",
        ),
    ] = "json",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Take the list as it was after this many steps. [default: all]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write, or for hf the folder. [default: stdout]")] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The GGUF file out of which --format gguf cuts the blocks. [default: the model, if it is one]",
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace what an earlier export left at --out.")] = False,
    device: Device = "cpu",
    memory_budget: MemoryBudget = None,
    as_json: Json = False,
) -> None:
    """Take the removal list away, or the smaller model itself.

    **hf**: safetensors with the blocks really removed, reloaded in a fresh process and compared with the
    original before the folder appears. **gguf**: the same for a GGUF file; the weights that stay are copied
    as they are. **mergekit**: a passthrough merge. **llama-quantize**: for llama.cpp's own tool. **sleb**:
    the reference's own option.
    """
    exported = run_folder.load(run)
    if gguf is not None and format != "gguf":
        raise OptionError("--gguf names the file that --format gguf cuts; add that, or leave it out.")
    if format not in ("hf", "gguf"):
        _export_list(exported, format, steps, out, replace, as_json)
        return
    if out is None:
        raise OptionError(f"--format {format} writes a {'folder' if format == 'hf' else 'file'}: name it with --out.")
    confirm_names(exported, allowed.trust_paths)
    with Screen(as_json) as screen:
        try:
            proof = api.export_model(
                exported,
                out,
                format=format,
                gguf=gguf,
                steps=steps,
                replace=replace,
                device=device,
                memory_budget=as_bytes(memory_budget),
                allow_pickle=allowed.allow_pickle,
                trust_remote_code=allowed.trust_remote_code,
                trust_paths=True,
                watcher=screen.watcher(),
            )
        except (KeyboardInterrupt, Stopped) as stopped:
            raise Stopped(f"Stopped; nothing was written to {out}.") from stopped
    if as_json:
        put(proof.model_dump_json())
    else:
        _print_proof(proof, out)


def _export_list(run: Run, format: str, steps: int | None, out: Path | None, replace: bool, as_json: bool) -> None:
    """Write the removal list to a file, or else to stdout."""
    text = render(run, format, steps)
    for remark in remarks(run, format):
        say(remark)
    if out is not None:
        save_text(out, text, replace=replace)
        say(f"Wrote {out}.")
    if as_json:
        blocks = list(run.removal_list_after(steps))
        put(json.dumps({"format": format, "removal_list": blocks, "text": text}))
    elif out is None:
        put(text, newline=False)


def _print_proof(proof: Proof, out: Path) -> None:
    """Print what was written, and how it was proven."""
    sizes = []
    if proof.bytes_before is not None:
        sizes = [("megabytes", f"{proof.bytes_before / 1e6:,.1f}", f"{proof.bytes_after / 1e6:,.1f}")]
    table(
        f"Wrote and proved {out}",
        ("", "before", "after"),
        [
            ("blocks", str(proof.blocks_before), str(proof.blocks_after)),
            ("parameters", f"{proof.parameters_before:,}", f"{proof.parameters_after:,}"),
            *sizes,
        ],
    )
    put(
        f"Reloaded in a fresh process: logits of {proof.tokens} tokens differ by at most "
        f"{proof.max_logit_difference:.2g} (allowed {proof.tolerance:.2g}), {proof.generated_tokens} tokens generated "
        "equal with and without cache."
    )
    if proof.checked:
        put(f"Also compared: {'; '.join(proof.checked)}.")


def report(
    run: RunName,
    out: Annotated[Path, typer.Option(help="The file to write, such as report.html.")],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Take the list as it was after this many steps. [default: all]")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a file that already exists at --out.")] = False,
) -> None:
    """Write a run as one HTML file to hand to a colleague: evidence, charts, list; needs no network to be read."""
    reported = api.load(run)
    reported.removal_list_after(steps)  # refused before anything is drawn
    from sleb.report import build  # plotly takes a second to import

    save_text(out, build.of(reported, steps), replace=replace)
    say(f"Wrote {out}.")
