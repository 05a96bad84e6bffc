"""The program's entry, `python -m sleb` and `sleb`: ready to be stopped before anything else is imported."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line. SIGTERM is Ctrl-C from the first moment on: both end in one sentence."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        from sleb.cli.main import main as command_line

        command_line()
    except KeyboardInterrupt:  # while it imported: nothing has begun
        os.write(2, b"sleb: Stopped on request.\n")
        os._exit(130)  # at once: modules that are half imported have nothing to say at the end


if __name__ == "__main__":
    main()
