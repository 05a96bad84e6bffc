"""`python -m sleb` is `sleb`."""

from .cli import main

if __name__ == "__main__":
    main()
