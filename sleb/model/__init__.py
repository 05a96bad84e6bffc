"""A Hugging Face model as a stack of blocks: found, loaded, streamed, generated with."""
