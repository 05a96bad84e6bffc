"""The dashboard: `main.py` is its entry, `data.py` a page's only door to run folders."""
