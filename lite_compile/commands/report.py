"""`liteattention report RUN.json`: a saved run as text, or as a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import CommandError
from ..run_record import read_record
from ..run_report import render_text, renderer

HELP = "Show a run that lite_compile.save_report('run.json') saved: as text, or as an HTML page with --output."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run and the file to write."""
    parser.add_argument("run", metavar="RUN.json", help="what lite_compile.save_report('run.json') wrote")
    parser.add_argument(
        "--output", "-o", metavar="FILE", help="write .html, .txt or .json there; default: text to the terminal"
    )


def run(args: argparse.Namespace) -> int:
    """Read, render, write."""
    try:
        record = read_record(args.run)
        if args.output is None:
            print(render_text(record), end="")
            return 0
        text = renderer(args.output)(record)
        Path(args.output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise CommandError(str(error)) from error
    print(f"wrote {args.output}")
    return 0
