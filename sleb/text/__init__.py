"""Text -> what the model would see: files, conversations and windows of token ids."""
