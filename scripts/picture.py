"""Draws the README's picture: a finished run as the terminal shows it.

python scripts/picture.py [RUN]        # without RUN, searches the demo model first (some minutes)
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console

import sleb
from sleb.cli.terminal import print_run

TARGET = Path(__file__).resolve().parent.parent / "assets" / "search.svg"


def main() -> None:
    """Write `assets/search.svg`."""
    run = sleb.load(sys.argv[1]) if len(sys.argv) > 1 else sleb.search("demo")
    # Names and folders of the machine it was drawn on are nobody's business.
    run = run.model_copy(update={"run_id": "20261122-demo-metric3", "run_dir": Path("20261122-demo-metric3")})
    console = Console(record=True, width=124, file=io.StringIO(), highlight=False, soft_wrap=False, force_terminal=True)
    console.print("[dim]$[/] [bold]sleb search demo[/]  [dim]# and afterwards[/]\n[dim]$[/] [bold]sleb show RUN[/]")
    print_run(run, console)
    TARGET.write_text(console.export_svg(title="sleb"))
    print(f"Wrote {TARGET}")


if __name__ == "__main__":
    main()
