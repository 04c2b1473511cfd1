"""``python -m omniops`` is the command ``omniops``."""

from omniops.cli import main

if __name__ == "__main__":
    main()
