"""Run folders, and the processes that work on them. No torch."""
