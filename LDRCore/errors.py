"""The error that users' input can cause. Imports nothing, so that every package may raise it."""

from __future__ import annotations


class RegistrationError(ValueError):
    """Input that cannot be used. The message is one sentence: the rule, and what came instead.

    It is one line, whatever came: characters that cannot be printed are replaced.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else " " if c in "\r\n" else "?" for c in message))
