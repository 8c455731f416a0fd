"""The one exception that a user is meant to read."""


class SealError(Exception):
    """A fault in what the user gave: one line that says what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """
