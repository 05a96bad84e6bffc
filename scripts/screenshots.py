"""Takes the README's four pictures of the dashboard, from the recorded sample: `make screenshots`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support import browser

TARGET = ROOT / "assets" / "screenshots"
SHOTS = {
    "steps": ("/steps?step=5", 980),
    "similarity": ("/similarity?cell=13-18", 980),
    "alignment": ("/alignment", 980),
    "evaluate": ("/evaluate?worse=100", 1000),
}


def main() -> None:
    """At 1400 pixels, in light."""
    TARGET.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as home, browser.server(Path(home)) as address:
        for name, (path, height) in SHOTS.items():
            with browser.tab(address, viewport={"width": 1400, "height": height}, color_scheme="light") as tab:
                tab.open(path)
                tab.page.wait_for_timeout(2000)
                tab.page.wait_for_function("() => !document.querySelector('[data-testid=stSkeleton]')")
                tab.page.wait_for_timeout(3000)  # charts and fonts
                tab.page.screenshot(path=TARGET / f"{name}.png")
                print(f"Took {TARGET / name}.png")


if __name__ == "__main__":
    main()
