"""What a model's files say and promise, before anything believes them. No torch but where a config is counted."""
