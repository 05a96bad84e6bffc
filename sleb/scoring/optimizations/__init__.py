"""What makes the sweep faster on this machine: each optimization, and the choice among them."""
