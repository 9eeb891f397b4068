"""Spellings of attention that the user registered."""

from __future__ import annotations

import threading
from typing import TypeVar

from .attention_site import Spelling

S = TypeVar("S", bound=Spelling)

_lock = threading.Lock()
_registered: tuple[Spelling, ...] = ()


def register_spelling(spelling: S) -> S:
    """Let the backend find one more way to write attention, in everything that is compiled from now on.

    Args:
        spelling: an instance of a subclass of `lite_compile.Spelling` with a `name` and a `pattern`. It is asked before
            those that were registered earlier, and before the built-in ones.

    Returns:
        `spelling`, for `unregister_spelling`.

    Raises:
        TypeError: it is not a `Spelling`, or its name is no text.
        ValueError: its name is empty or taken, or it has no `pattern`.
    """
    global _registered
    if isinstance(spelling, type) and issubclass(spelling, Spelling):
        raise TypeError(f"spelling is the class {spelling.__name__}; allowed: an instance of it, {spelling.__name__}()")
    if not isinstance(spelling, Spelling):
        raise TypeError(
            f"spelling is {spelling!r} ({type(spelling).__name__}); allowed: an instance of a subclass of "
            "lite_compile.Spelling"
        )
    if not isinstance(spelling.name, str):
        raise TypeError(f"name of {type(spelling).__name__} is {spelling.name!r}; allowed: a text")
    if not spelling.name:
        raise ValueError(f"name of {type(spelling).__name__} is empty; allowed: a text that the report can print")
    if type(spelling).pattern is Spelling.pattern:
        raise ValueError(
            f"{type(spelling).__name__} has no method pattern(node); allowed: AttentionSite or None from it"
        )
    with _lock:
        if any(other.name == spelling.name for other in _registered):
            raise ValueError(
                f"a spelling named {spelling.name!r} is registered already; allowed: another name, or "
                f"unregister_spelling({spelling.name!r}) before"
            )
        _registered = (spelling, *_registered)
    return spelling


def unregister_spelling(spelling: Spelling | str) -> None:
    """Undo `register_spelling`; what was compiled before stays as it is.

    Args:
        spelling: what was registered, or its name.

    Raises:
        ValueError: it is not registered.
    """
    global _registered
    name = spelling if isinstance(spelling, str) else getattr(spelling, "name", None)
    with _lock:
        left = tuple(other for other in _registered if other is not spelling and other.name != name)
        if len(left) == len(_registered):
            allowed = ", ".join(repr(other.name) for other in _registered) or "nothing, none is registered"
            raise ValueError(
                f"spelling {name if name is not None else spelling!r} is not registered; allowed: {allowed}"
            )
        _registered = left


def registered_spellings() -> tuple[Spelling, ...]:
    """What the user registered, the latest first."""
    return _registered
