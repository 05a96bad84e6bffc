"""Processes that execute jobs: started, stopped, watched, several together, and the device queue."""
