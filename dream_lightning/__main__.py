"""`python -m dream_lightning`, the same as `dream-lightning`."""

from dream_lightning.cli import main

if __name__ == "__main__":
    main()
