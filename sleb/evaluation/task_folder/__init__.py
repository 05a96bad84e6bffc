"""The files of a task folder: what a stranger's may do, and the limits that end what would not end by itself."""
