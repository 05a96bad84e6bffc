"""Being built."""

from app import components

run = components.run_page("steps", "What it answers, in one sentence.")
