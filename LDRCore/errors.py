"""The one error that users' input can cause. Imports nothing, so every layer may raise it."""

from __future__ import annotations


class RegistrationError(ValueError):
    """Input that cannot be registered. The message is one sentence: the rule, and what came instead."""
