"""Similarity of block outputs and prediction alignment, with their cache."""
