"""How fast the dashboard is, in a real browser over made-up runs: 80 blocks x 40 steps, and a store of 500 runs.

python benchmarks/dashboard.py [--visits 200]

Prints seconds beside what was promised, and beside a simpler way where there is one: a list that loads every run whole,
and a step that asks the server.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support import browser
from tests.support.runs import stores

PAGES = {
    "runs": '[data-testid="stDataFrame"]',
    "similarity": ".js-plotly-plot .heatmaplayer image",
    "alignment": ".js-plotly-plot .scatterlayer .trace",
    "steps": ".stepper .column",
    "compare": ".js-plotly-plot",
    "export": '[data-testid="stCode"]',
}
NAMES = {
    "runs": "Runs",
    "similarity": "Similarity",
    "alignment": "Prediction alignment",
    "steps": "Removal steps",
    "compare": "Compare",
    "export": "Export",
}
BIG = "big-80x40"


def main() -> None:
    """Everything once; a few minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visits", type=int, default=200, help="page visits for the memory of the server")
    visits = parser.parse_args().visits
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ["SLEB_HOME"] = str(home)
        stores.write_run(home / "runs" / BIG, 80, 40)
        with browser.server(home) as address:
            first_paint(address)
            switches(address)
            steps(address)
            memory(address, visits)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ["SLEB_HOME"] = str(home)
        stores.write_many(home / "runs", 500)
        listing()
        with browser.server(home) as address:
            show("list 500 runs, in the browser, first time", opened(address, "/", PAGES["runs"]), 1.0 + 3.0)
            show("list 500 runs, in the browser, again", opened(address, "/", PAGES["runs"]), 3.0)


def first_paint(address: str) -> None:
    """A browser that has never been here, a server that has been asked before."""
    opened(address, "/", PAGES["runs"])
    show("first paint, warm", statistics.median(opened(address, "/", PAGES["runs"]) for _ in range(5)), 3.0)
    path = f"/steps?run={BIG}"
    opened(address, path, PAGES["steps"])
    show(
        "first paint of Removal steps", statistics.median(opened(address, path, PAGES["steps"]) for _ in range(5)), 3.0
    )


def switches(address: str) -> None:
    """Go from page to page by the navigation, each visited once before."""
    with browser.tab(address) as tab:
        tab.open(f"/?run={BIG}")
        for name in PAGES:
            switch(tab, name)
        for name in PAGES:
            taken = []
            for _ in range(3):
                switch(tab, "export" if name != "export" else "runs")
                taken.append(timed(lambda name=name: switch(tab, name)))
            show(f"switch to {NAMES[name]}", statistics.median(taken), 1.0)


def steps(address: str) -> None:
    """Time from the key to the drawn frame, in the browser, beside loading the page again."""
    with browser.tab(address) as tab:
        tab.open(f"/steps?run={BIG}&step=1")
        tab.page.wait_for_selector(PAGES["steps"])
        tab.page.wait_for_timeout(1000)
        tab.page.locator(PAGES["steps"]).first.focus()
        drawn = """async () => {
            const began = performance.now();
            window.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
            await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
            return performance.now() - began;
        }"""
        taken = [tab.page.evaluate(drawn) / 1000 for _ in range(20)]
        show("a step of the stepper, median", statistics.median(taken), 0.1)
        show("a step of the stepper, slowest of 20", max(taken), 0.1)
        requests = []
        for step in (3, 5, 7):
            requests.append(timed(lambda step=step: tab.open(f"/steps?run={BIG}&step={step}")))
        ratio = statistics.median(requests) / statistics.median(taken)
        loaded = f"{'  the same by loading the page at that step':<48} {statistics.median(requests):7.2f} s"
        print(f"{loaded}   ratio {ratio:.0f}")


def memory(address: str, visits: int) -> None:
    """Resident memory of the server after a first round and after many."""
    port = int(address.rpartition(":")[2])
    server = next(each for each in psutil.process_iter() if _listens(each, port))
    with browser.tab(address) as tab:
        tab.open(f"/?run={BIG}")
        sizes = []
        names = list(PAGES)
        for visit in range(visits):
            switch(tab, names[visit % len(names)])
            if visit % 20 == 19:
                sizes.append(server.memory_info().rss / 1e6)
    print(
        f"{'memory of the server over ' + str(visits) + ' visits':<48} "
        + " ".join(f"{size:.0f}" for size in sizes)
        + " MB"
    )


def listing() -> None:
    """List runs without an index, in this process: outlines against loading every run whole."""
    from sleb.runtime import run_folder
    from sleb.runtime.listing import run_list

    short = timed(lambda: run_list.list_outlines(run_folder.runs_folder()))
    whole = timed(run_folder.list_runs)
    show("list 500 runs, cold", short, 1.0)
    print(f"{'  the same by loading each whole':<48} {whole:7.2f} s   ratio {whole / short:.1f}")


def opened(address: str, path: str, drawn: str) -> float:
    """Seconds from the address to the drawing, in a new browser."""
    with browser.tab(address) as tab:
        return timed(lambda: (tab.open(path), tab.page.wait_for_selector(drawn, state="attached")))


def switch(tab: browser.Tab, name: str) -> None:
    """Open a page by the navigation, until it is drawn."""
    tab.page.get_by_test_id("stTopNavLink").filter(has_text=NAMES[name]).first.click()
    tab.page.wait_for_url("**/" + ("?**" if name == "runs" else f"{name}**"))
    tab.idle()
    tab.page.wait_for_selector(PAGES[name], state="attached")


def timed(act: Callable[[], object]) -> float:
    """Seconds that the page took."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def show(label: str, seconds: float, promised: float) -> None:
    """A line of the table."""
    verdict = "within" if seconds <= promised else "MISSES"
    print(f"{label:<48} {seconds:7.3f} s   {verdict} {promised:g} s", flush=True)


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        return f"--server.port={port}" in process.cmdline() and "streamlit" in process.cmdline()
    except psutil.Error:
        return False


if __name__ == "__main__":
    main()
