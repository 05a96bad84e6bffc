"""What is being written: names that say whose it is, workspaces that a killed writer leaves, and putting in place."""
