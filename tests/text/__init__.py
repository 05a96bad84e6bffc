"""Text as the model would see it."""
