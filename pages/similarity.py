"""Being built."""

from app import components

run = components.run_page("similarity", "What it answers, in one sentence.")
