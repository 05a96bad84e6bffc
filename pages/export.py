"""Being built."""

from app import components

run = components.run_page("export", "What it answers, in one sentence.")
