"""What the command line can be told off for."""


class UsageError(Exception):
    """A command line that cannot be meant; the message is one line."""
