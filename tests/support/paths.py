"""Where the tests find what they read: the checkout, their own data, and text that may lie beside the checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared"
"""Real text and the paper, on machines that have them; tests that need them are skipped elsewhere."""
