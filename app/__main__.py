"""`python -m app` starts the dashboard of this checkout; arguments go to Streamlit."""

from __future__ import annotations

import os
import sys

from sleb.runtime import dashboard_files

if __name__ == "__main__":
    os.execv(sys.executable, dashboard_files.command(sys.argv[1:]))
