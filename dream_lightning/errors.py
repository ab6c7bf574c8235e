"""The one error for what a user can correct."""


class UserError(ValueError):
    """A mistake that the user can correct. Its message says what was got, what was wanted, and what to do.

    The command line prints the message alone; everything else keeps its traceback.
    """
