"""Exceptions that reach the user as what they are, although Dynamo calls our code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

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


def wrong_type(name: str, value: object, allowed: str) -> OptionTypeError:
    """The error for an option of a wrong type."""
    return OptionTypeError(f"liteattention option {name!r} is {value!r} ({type(value).__name__}); allowed: {allowed}")


def wrong_value(name: str, value: object, allowed: str) -> OptionValueError:
    """The error for an option that is out of range."""
    return OptionValueError(f"liteattention option {name!r} is {value!r}; allowed: {allowed}")


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""
