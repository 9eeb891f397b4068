"""`liteattention explain MODULE:CALLABLE`: what the backend would do with a model of yours."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import CommandError, OptionTypeError, OptionValueError, nearest
from ..explanation import explain
from ..options import Options

HELP = "Print which attention of a model would be rewritten, and why the rest would not be; nothing is computed."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The factory and the options of the backend."""
    parser.add_argument(
        "factory", metavar="MODULE:CALLABLE",
        help="called without arguments, it returns the model and the keyword arguments of its call: (model, kwargs). "
        "MODULE is imported from the current folder or the environment, or is the path of a .py file",
    )  # fmt: skip
    parser.add_argument(
        "--option", "-o", action="append", default=[], metavar="NAME=VALUE",
        help="an option of the backend as in torch.compile(options=...), for example threshold=-6; may be repeated",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the table of `lite_compile.explain`."""
    options = parse_options(args.option)
    factory = load_factory(args.factory)
    print(f"making the model: {args.factory}()", file=sys.stderr, flush=True)
    model, kwargs = call_factory(factory, args.factory)
    print("capturing its graphs, which may take a minute for a large model", file=sys.stderr, flush=True)
    print(explain(model, backend_options=options, **kwargs))
    return 0


def parse_options(given: list[str]) -> dict[str, Any]:
    """Options of the backend from `NAME=VALUE`, checked."""
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise CommandError(f"--option is {text!r}; allowed: NAME=VALUE, for example threshold=-6")
        options[name.strip()] = _value(value)
    try:
        Options.parse(options)
    except (OptionTypeError, OptionValueError) as error:
        raise CommandError(f"--option: {error}") from error
    return options


def _value(text: str) -> Any:
    """A Python literal, a number such as -inf, or the text itself."""
    for read in (ast.literal_eval, float):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return text


def load_factory(spec: str, returns: str = "(model, kwargs)") -> Callable[[], Any]:
    """The callable that `MODULE:CALLABLE` names. What the module itself raises is not touched."""
    name, colon, attribute = spec.rpartition(":")
    if not colon or not name or not attribute:
        raise CommandError(f"{spec!r} is not MODULE:CALLABLE, such as my_models:make_wan or models/wan.py:make_wan")
    module = _load_file(Path(name)) if name.endswith(".py") else _import(name)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [other for other in dir(found) if callable(getattr(found, other)) and not other.startswith("_")]
            raise CommandError(f"{name!r} has no {attribute!r}.{nearest(part, known)}")
        found = getattr(found, part)
    if not callable(found):
        raise CommandError(f"{spec!r} is {type(found).__name__}; allowed: a function that returns {returns}")
    factory: Callable[[], Any] = found
    return factory


def _import(name: str) -> ModuleType:
    if not all(name.split(".")):  # a relative import
        raise CommandError(f"{name!r} is no name of a module, such as my_models, nor the path of a .py file")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # another module, which the user's imports
        advice = "run this in the folder that holds it, or give the path of a .py file"
        raise CommandError(f"there is no module {error.name!r} here or in the environment; {advice}") from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise CommandError(f"there is no file {str(path)!r}")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def call_factory(factory: Callable[[], Any], spec: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The model and the arguments of its call."""
    made = factory()
    if not isinstance(made, tuple) or len(made) != 2 or not callable(made[0]) or not isinstance(made[1], Mapping):
        kinds = f"({', '.join(type(x).__name__ for x in made)})" if isinstance(made, tuple) else type(made).__name__
        raise CommandError(
            f"{spec}() returned {kinds}; allowed: (model, kwargs), the model and a dict of its call's keyword arguments"
        )
    return made[0], dict(made[1])
