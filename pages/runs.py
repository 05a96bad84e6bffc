"""Being built."""

from app import components

components.title("runs", "caption")
run = components.chosen_run()
