"""What other libraries say at every start and is no news here; imported before them."""

import logging

# That a kernel for 4-bit products on a CPU is missing, which this package never asks for
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Lightning's tips to install more of its maker's programs
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
    lambda record: "try installing [lit" not in record.getMessage()
)
