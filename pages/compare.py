"""Being built."""

from app import components

run = components.run_page("compare", "What it answers, in one sentence.")
