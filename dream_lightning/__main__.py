"""`python -m dream_lightning`."""

import gc

from dream_lightning.cli import main

if __name__ == "__main__":
    # What imports made stays: 600,000 objects, which every full collection would look through in half a second, several
    # times while the first layer is compiled.
    gc.freeze()
    main()
