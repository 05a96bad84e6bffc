"""Records and summaries -> Plotly figures: pure functions, one file for each subject. Reads no file."""
