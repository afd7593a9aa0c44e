"""The exceptions whose messages are shown to the user without a traceback."""


class UserError(Exception):
    """What was asked for cannot be done; the message names the key or file, its value, and what is legal."""


class SweepFailed(Exception):
    """Some runs of a sweep failed; the message lists them, each with its cause and its log."""
