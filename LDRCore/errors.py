"""The error that users' input can cause. Imports nothing, so that every package may raise it."""

from __future__ import annotations


class RegistrationError(ValueError):
    """Input that cannot be used. The message is one sentence: the rule, and what came instead."""
