"""What a removal list costs and buys."""
