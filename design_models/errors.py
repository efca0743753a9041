"""Errors that name what was asked, what was found, and the remedy."""


class ModelError(ValueError):
    """A design model or its inputs cannot be used as given; the message says how to mend it."""
