"""`python -m dream_lightning`."""

from dream_lightning.cli import main, tune_gc

if __name__ == "__main__":
    tune_gc()
    main()
