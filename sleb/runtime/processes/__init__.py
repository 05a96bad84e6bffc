"""Processes that execute jobs: started, stopped, watched, several together, and whose turn it is on a device."""
