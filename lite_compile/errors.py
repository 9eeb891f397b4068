"""Exceptions that reach the user as what they are, although Dynamo calls our code."""

from __future__ import annotations

from torch._dynamo.exc import ShortenTraceback


class _PassesThroughDynamo(ShortenTraceback):
    """Dynamo wraps any other exception of a backend in `BackendCompilerFailed`."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class OptionValueError(_PassesThroughDynamo, ValueError):
    """An option is unknown or its value is out of range."""


class OptionTypeError(_PassesThroughDynamo, TypeError):
    """An option's value has the wrong type."""


class UnsupportedAttentionError(_PassesThroughDynamo, ValueError):
    """`on_unsupported="error"` and some attention could not be rewritten."""


class CommandError(Exception):
    """A command of `liteattention` cannot be carried out; the message says what to do."""
