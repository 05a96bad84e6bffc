"""Run folders for tests: made up, evaluated, and from strangers."""
