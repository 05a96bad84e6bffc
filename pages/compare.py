"""Being built."""

from app import components

components.title("compare", "caption")
run = components.chosen_run()
