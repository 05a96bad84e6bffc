"""Being built."""

from app import components

run = components.run_page("alignment", "What it answers, in one sentence.")
