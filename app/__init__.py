"""The dashboard: `main.py` is its entry, `data.py` a page's only door to the backend, `charts/` draws records."""
