"""Being built."""

from app import components

components.title("steps", "caption")
run = components.chosen_run()
