"""The dashboard's server: Streamlit, with the settings of this program and of the user who starts it. Draws nothing.

Streamlit also takes `.streamlit/config.toml` and `.streamlit/secrets.toml` of the folder in which it is started, and
turns secrets into environment variables. That folder is data here: a file in it could open the server to the network,
switch its protection off, or grant what only the command line grants.
"""

from __future__ import annotations

import sys
from pathlib import Path

from streamlit import config, file_util
from streamlit.web import cli

HERE = Path(__file__).resolve().parent
FOREIGN = (
    "This version of Streamlit reads settings from the current folder; install one that sleb supports (see its "
    "requirements)."
)


def own_file(*names: str) -> str:
    """The path, beside this file, of a settings file that Streamlit would look for in the current folder."""
    return str(HERE.joinpath(".streamlit", *names))


def read_own_settings_only() -> None:
    """Make Streamlit ignore the current folder's settings and secrets; ends the program if that fails."""
    file_util.get_project_streamlit_file_path = own_file
    allowed = {own_file(), file_util.get_streamlit_file_path()}
    for name in ("config.toml", "secrets.toml"):
        if not {str(Path(each).parent) for each in config.get_config_files(name)} <= allowed:
            sys.exit(FOREIGN)


if __name__ == "__main__":
    read_own_settings_only()
    cli.main(prog_name="streamlit")
