"""Figures and the HTML report. Knows records and Plotly; no Streamlit, no torch."""
