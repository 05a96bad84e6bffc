"""`python -m sleb` is `sleb`."""

from sleb.cli.main import main

if __name__ == "__main__":
    main()
