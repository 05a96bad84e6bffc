"""The files of a `--task-folder`: what a stranger's may do, and how what has no end is ended."""
