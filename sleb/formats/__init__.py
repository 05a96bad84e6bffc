"""Results as text, for people and for other tools. Knows records; no torch."""
