"""`python -m dream_lightning`."""

from dream_lightning.cli import main, spare_collections

if __name__ == "__main__":
    spare_collections()
    main()
