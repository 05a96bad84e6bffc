"""Draws the README's animation, `assets/removal-steps.gif`: the sample's steps, one after another, in a real browser.

`make animation` calls it.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support import browser

TARGET = ROOT / "assets" / "removal-steps.gif"
STEPS = 8
EDGE, HEIGHT = 14, 540
"""Pixels: white around the player, and the height of the picture."""
MILLISECONDS = 1100
"""How long a step stands; the last one stands three times as long."""


def main() -> None:
    """Step through the sample at 1200 pixels, in light, and keep what the player shows."""
    frames = []
    look: dict[str, Any] = {"viewport": {"width": 1200, "height": 1000}, "color_scheme": "light"}
    with (
        tempfile.TemporaryDirectory() as home,
        browser.server(Path(home)) as address,
        browser.tab(address, **look) as tab,
    ):
        tab.open("/steps?step=1")
        player = tab.page.locator(".stepper").first
        player.wait_for()
        tab.page.wait_for_timeout(3000)  # charts and fonts
        for _ in range(STEPS):
            tab.page.mouse.move(0, 0)
            tab.page.wait_for_timeout(700)  # the bars move to their places
            box = player.bounding_box()
            clip = {"x": box["x"] - EDGE, "y": box["y"] - EDGE, "width": box["width"] + 2 * EDGE, "height": HEIGHT}
            frames.append(Image.open(io.BytesIO(tab.page.screenshot(clip=clip))).convert("RGB"))
            player.get_by_role("button", name="Next").click()
    colours = frames[-1].quantize(128, Image.Quantize.MAXCOVERAGE)  # one palette, so that nothing flickers
    drawn = [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
    durations = [MILLISECONDS] * (STEPS - 1) + [3 * MILLISECONDS]
    drawn[0].save(TARGET, save_all=True, append_images=drawn[1:], duration=durations, loop=0, optimize=True)
    print(f"Drew {TARGET}, {TARGET.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
