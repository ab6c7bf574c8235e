"""What other libraries say at every start and is no news here; imported before them."""

import logging

# That a kernel for 4-bit products on a CPU is missing, which this package never asks for
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
