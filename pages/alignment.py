"""Being built."""

from app import components

components.title("alignment", "caption")
run = components.chosen_run()
