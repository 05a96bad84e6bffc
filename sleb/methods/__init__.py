"""Searches over a score function. Knows scores and block indices; no torch."""
