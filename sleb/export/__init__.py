"""The smaller model on disk, proven."""
