"""Healing a streamlined model: least squares at its cuts, adapters, or both."""
