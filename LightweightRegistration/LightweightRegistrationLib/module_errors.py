"""The errors of the module: what a user can do something about, and a cancelled run."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used. The message is one sentence: what is required, and what was given.

    Attributes:
        details: more for a dialog or a report of an error, such as the end of the log; may be empty.
    """

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details


class CancelledError(Exception):
    """The user cancelled, or the scene was closed during the run. Nothing was changed."""


class MemoryNeededError(InputError):
    """There is not enough memory for a registration.

    Attributes:
        fewer_cascades: a smaller number of cascades to offer, or None.
    """

    def __init__(self, message: str, fewer_cascades: int | None = None, details: str = ""):
        super().__init__(message, details)
        self.fewer_cascades = fewer_cascades
