"""Write `docs/models.md`: what is rewritten in each model of the zoo. `--numbers` prints what the registry wants."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from zoo_model import ZooModel
from zoo_models import ZOO
from zoo_runs import observe

from lite_compile import Report

PATH = Path(__file__).resolve().parents[2] / "docs" / "models.md"
HEADER = """\
# Models

What `backend="liteattention"` finds in the transformers of diffusers 0.42.1, and in two that are written from their
papers. `make models-doc` writes this page from tiny random models (`tests/zoo/zoo_models.py`: about 256 tokens,
`min_seq_len=64`). `tests/zoo` checks each row, compares each model with its eager self, and runs two generations of it.

- **graphs**: what Dynamo makes of the first call. All graphs of a model share one clock.
- **sites**: attention in these graphs. Blocks that share a graph count once.
- **protected**: the text in joint attention, whose tiles are always computed.

No model's source is edited and no generation announced. The library of LiteAttention's authors asks for both: one of
its modules per layer in each model's source, and a call before each new video.

| class | variant | graphs | rewritten | sites | protected | why the rest is dense | remarks |
|---|---|---|---|---|---|---|---|
"""


def row(zoo: ZooModel, report: Report) -> str:
    """The table's row of one model."""
    reasons = Counter({reason.value: count for reason, count in report.reasons().items()})
    cells = [
        zoo.class_name,
        zoo.variant,
        len(report.graphs),
        len(report.rewritten),
        len(report.sites),
        protected_tokens(report),
        ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items())),
        zoo.note,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def protected_tokens(report: Report) -> str:
    """Ranges that are protected in any site."""
    ranges = {tuple(item) for site in report.rewritten for item in getattr(site, "protected", ())}
    return ", ".join(f"{start} to {end}" for start, end in sorted(ranges)) or "-"


def numbers(report: Report) -> str:
    """What is to be expected of a model, as the registry writes it."""
    dense = ", ".join(f"{reason.name}: {count}" for reason, count in report.reasons().items())
    return f"rewritten={len(report.rewritten)}, dense={{{dense}}}, graphs={len(report.graphs)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numbers", action="store_true", help="print the numbers and write nothing")
    parser.add_argument("models", nargs="*", help="with --numbers: only models whose name contains one of these")
    arguments = parser.parse_args()
    if arguments.numbers:
        for zoo in ZOO.values():
            if not arguments.models or any(part in zoo.name for part in arguments.models):
                print(f"{zoo.name}: {numbers(observe(zoo).report)}", flush=True)
    else:
        PATH.write_text(HEADER + "".join(f"{row(zoo, observe(zoo).report)}\n" for zoo in ZOO.values()))


if __name__ == "__main__":
    main()
