"""Being built."""

from app import components

run = components.run_page("runs", "What it answers, in one sentence.")
