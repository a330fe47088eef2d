"""The one exception of the lab."""


class LabError(Exception):
    """Something the user asked for can't be done; the message says what is allowed instead."""
