"""What pages, figures and the report say about results, computed once. Draws nothing."""
