"""Being built."""

from app import components

components.title("export", "caption")
run = components.chosen_run()
