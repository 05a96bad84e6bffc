"""Records -> Plotly figures: pure functions, one file a page. Knows no Streamlit and reads no file."""
