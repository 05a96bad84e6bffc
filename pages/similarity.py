"""Being built."""

from app import components

components.title("similarity", "caption")
run = components.chosen_run()
