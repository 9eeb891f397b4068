"""The command line `liteattention`: `COMMANDS` lists what it can do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from .commands import bench, calibrate, doctor, explain, report
from .environment import installed_version
from .errors import CommandError


class Command(Protocol):
    """What a module of `commands` offers."""

    HELP: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS: dict[str, Command] = {
    "doctor": cast(Command, doctor),
    "explain": cast(Command, explain),
    "report": cast(Command, report),
    "calibrate": cast(Command, calibrate),
    "bench": cast(Command, bench),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit status: 0 if all is well, 1 if the command found something wrong, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="liteattention", description="Temporal sparse attention for diffusion transformers: look inside."
    )
    parser.add_argument("--version", action="version", version=f"lite-compile {installed_version('lite-compile')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP, description=command.HELP))
    args = parser.parse_args(arguments)
    try:
        return COMMANDS[args.command].run(args)
    except CommandError as error:
        print(f"liteattention {args.command}: {error}", file=sys.stderr)
        return 2
