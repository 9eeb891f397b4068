"""Write the tables of the README and of docs/ from the JSON in benchmarks/results/ (`make bench-doc`).

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; what is between them is replaced. `--check`
writes nothing and fails if a file would change.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "docs" / "performance.md", ROOT / "docs" / "fidelity.md", ROOT / "README.md")
_MARKERS = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

# Of each shape, and of each model and what is compiled of it, the first of these files that has it counts.
ATTENTION, ATTENTION_H100 = ("bench-gpu-h200.json",), ("bench-gpu-h100.json",)
FORWARD = ("bench-forward-h200.json", "bench-forward-h200-40-layers.json")
FORWARD_H100 = (
    "bench-forward-h100.json",
    "bench-forward-h100-40-layers.json",
    "bench-forward-h100-4096-whole.json",
    "bench-forward-h100-4096-blocks.json",
)
SHORT_TABLE = (0.0, 0.42, 0.57, 0.77)
"""Skipped shares of the tables of forwards, and of the README's of attention."""
LONG_TABLE = (0.21, 0.42, 0.57, 0.77, 0.9)
"""Those of all that `bench_gpu.py` measures."""
BREAK_EVEN = "bench-short-h200.json"
CALIBRATION, CALIBRATION_MASS = "calibration-long-h100.json", "calibration-mass-long-h100.json"
FIDELITY, FIDELITY_CALIBRATED = "fidelity-long-h200.json", "fidelity-long-calibrated-h100.json"
MODELS = {
    "1.3b": "Wan2.1-1.3B, 480p, 32,760 tokens",
    "14b": "Wan2.1-14B, 720p, 75,600 tokens",
    "14b-deep": "Wan2.1-14B, 720p, 75,600 tokens",
    "14b-whole": "Wan2.1-14B, 720p, 75,600 tokens",
    "1.3b-short": "Wan2.1-1.3B, 4,096 tokens",
}
Row = dict[str, Any]


def load(name: str) -> dict[str, Any]:
    """One file of results."""
    return json.loads((RESULTS / name).read_text())


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(header)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def load_newest(names: Sequence[str], case: Callable[[Row], str]) -> tuple[list[Row], str]:
    """Of each `case` the rows of the first run that has it; and where they are from."""
    rows: list[Row] = []
    about = ""
    for name in names:
        run = load(name)
        known = [case(row) for row in rows]
        new = [row for row in run["rows"] if case(row) not in known]
        rows += new
        values = ", ".join(dict.fromkeys(map(case, new)))
        versions = ", ".join(f"{tool} {run[tool]}" for tool in ("torch", "triton", "cudnn") if tool in run)
        about += f"\n{values}: {run['device']}, {versions}, bf16, commit {run['commit']} "
        about += f"(`benchmarks/results/{name}`).\n"
    return rows, about


def shape_name(row: Row) -> str:
    """`B x H x S x D`."""
    return " x ".join(map(str, row["shape"]))


def model_name(row: Row) -> str:
    """The model and what of it was compiled."""
    return f"{row['model']} ({row['compiled']})"


def key(row: Row) -> tuple[tuple[int, ...], str, str]:
    """Shape, kernel and mask of a row."""
    return tuple(row["shape"]), row["kernel"], row["pattern"]


def share_of(row: Row, shares: Sequence[float] = SHORT_TABLE) -> float | None:
    """Which of `shares` a row stands for: few tiles cannot be divided at will. None if it is none."""
    share = min(shares, key=lambda share: abs(row["skipped"] - share))
    return share if abs(row["skipped"] - share) <= 0.02 else None


def attention() -> str:
    """What `bench_gpu.py` measured with nothing skipped."""
    measured, about = load_newest(ATTENTION, shape_name)
    header = ("B x H x S x D", "kernel", "ms", "cold, ms", "TF", "x cuDNN", "error")
    rows = [
        (
            shape_name(row), row["kernel"], f"{row['ms']:.2f}", f"{row['cold_ms']:.2f}",
            f"{row['effective_tflops']:.0f}", f"{row['speed_up']:.2f}", f"{row['error']:.1e}",
        )
        for row in measured
        if not row["skipped"]
    ]  # fmt: skip
    return table(header, rows) + about


def attention_sparse() -> str:
    """What `bench_gpu.py` measured of each mask."""
    measured, about = load_newest(ATTENTION, shape_name)
    found: dict[Any, dict[float, Row]] = {}
    for row in measured:
        share = share_of(row, LONG_TABLE)
        if share is not None:
            found.setdefault(key(row), {})[share] = row

    def cell(share: float, row: Row | None) -> str:
        if row is None:
            return "not measured"
        real = f" (at {100 * row['skipped']:.1f} %)" if abs(row["skipped"] - share) > 0.005 else ""
        return f"{row['ms']:.2f} / {row['effective_tflops']:.0f} / {row['speed_up']:.2f} / {row['of_ideal']:.2f}{real}"

    rows = [
        (shape_name(next(iter(by_share.values()))), kernel, pattern, *(cell(s, by_share.get(s)) for s in LONG_TABLE))
        for (_, kernel, pattern), by_share in found.items()
    ]
    header = ("B x H x S x D", "kernel", "mask", *(f"{100 * share:.0f} %" for share in LONG_TABLE))
    return table(header, rows) + about


def attention_short(names: Sequence[str] = ATTENTION) -> str:
    """Speed-up over cuDNN at three levels of scattered skipping, for both kernels."""
    measured, about = load_newest(names, shape_name)
    rows = []
    for shape in dict.fromkeys(tuple(row["shape"]) for row in measured):
        for kernel in ("hopper", "triton"):
            found = [row for row in measured if key(row) == (shape, kernel, "scattered")]
            if found:
                by_share = {share_of(row): f"{row['speed_up']:.2f} x" for row in found}
                cells = (by_share.get(share, "not measured") for share in SHORT_TABLE)
                rows.append((shape_name(found[0]), kernel, *cells))
    header = ("B x H x S x D", "kernel", *(f"{100 * share:.0f} % skipped" for share in SHORT_TABLE))
    return table(header, rows) + about


def attention_8_bits() -> str:
    """What q and k in 8 bits bring and cost with nothing skipped."""
    measured, about = load_newest(ATTENTION_H100, shape_name)
    found = {(shape_name(row), row["kernel"]): row for row in measured if not row["skipped"]}
    rows = []
    for shape in dict.fromkeys(shape for shape, _ in found):
        plain = found[shape, "hopper"]
        cells = [shape, f"{plain['ms']:.2f} ({plain['error']:.1e})"]
        for row in (found[shape, "hopper-int8"], found[shape, "hopper-fp8"]):
            cells.append(f"{row['ms']:.2f}, {plain['ms'] / row['ms']:.2f} x ({row['error']:.1e})")
        rows.append(cells)
    return table(("B x H x S x D", "hopper, ms (error)", "hopper-int8", "hopper-fp8"), rows) + about


def break_even() -> str:
    """Short sequences: cuDNN's time over ours, by kernel and head dim, at each skipped share."""
    run = load(BREAK_EVEN)
    columns = list(dict.fromkeys((row["kernel"], row["shape"][3]) for row in run["rows"]))
    shares = list(dict.fromkeys(row["share"] for row in run["rows"]))
    found = {(row["shape"][2], row["kernel"], row["shape"][3], row["share"]): row["speed_up"] for row in run["rows"]}
    rows = [
        [f"{tokens:,}", *(" / ".join(f"{found[(tokens, *column, x)]:.2f}" for x in shares) for column in columns)]
        for tokens in dict.fromkeys(row["shape"][2] for row in run["rows"])
    ]
    header = ["tokens", *(f"{kernel}, D={dim}" for kernel, dim in columns)]
    about = f"{run['device']}, torch {run['torch']}, triton {run['triton']}, bf16, commit {run['commit']}"
    return table(header, rows) + f"\n{about} (`benchmarks/results/{BREAK_EVEN}`).\n"


def forward(names: Sequence[str] = FORWARD) -> str:
    """Speed-up of one forward of a transformer."""
    measured, about = load_newest(names, model_name)
    assert all(row["kernel"] != "dense" for row in measured), "attention stayed dense: measure with --min-seq-len"
    rows = []
    for model, part in dict.fromkeys((row["model"], row["compiled"]) for row in measured):
        found = {share_of(row): row for row in measured if (row["model"], row["compiled"]) == (model, part)}
        any_row = next(iter(found.values()))
        dense = any_row["inductor_cudnn_ms"]
        cells = (
            f"{found[share]['ms']:.0f} ({dense / found[share]['ms']:.2f} x)" if share in found else "not measured"
            for share in SHORT_TABLE
        )
        rows.append((MODELS[model], str(any_row["layers"]), part, f"{dense:.0f}", *cells))
    header = (
        "model",
        "layers",
        "compiled",
        "Inductor + cuDNN, ms",
        *(f"ours, {100 * share:.0f} % skipped, ms" for share in SHORT_TABLE),
    )
    return table(header, rows) + about


def resources() -> str:
    """What the portable kernel is compiled to: without and with a bias, by the oldest and the newest Triton."""
    old, new = (load(f"kernel-resources-triton-{version}.json") for version in ("3.6", "3.9"))
    plain, biased = ([row for row in new["rows"] if row["bias"] is bias] for bias in (False, True))
    spilled = [[f"{row['spilled_bytes']}" for row in old["rows"] if row["bias"] is bias] for bias in (False, True)]
    header = ["capability", "D", "tile", "warps", "stages", "loads", "registers", "spilled, bytes"]
    header += [f"spilled, Triton {old['triton']}", "shared, KB", "blocks at once", "limited by"]
    rows = [
        (
            f"{a['arch'] / 10:.1f}", f"{a['head_dim']}", f"{a['tile'][0]} x {a['tile'][1]}", f"{a['warps']}",
            f"{a['stages']}", "TMA" if a["tma"] else "pointers", f"{a['registers']} / {b['registers']}",
            f"{a['spilled_bytes']} / {b['spilled_bytes']}", f"{old_a} / {old_b}",
            f"{a['shared_kb']:.0f} / {b['shared_kb']:.0f}", f"{a['blocks']}", a["limit"],
        )
        for a, b, old_a, old_b in zip(plain, biased, *spilled, strict=True)
    ]  # fmt: skip
    return table(header, rows) + f"\nbfloat16, Triton {new['triton']} but where it says {old['triton']}.\n"


def suites() -> str:
    """The GPU test runs."""
    header = ("device", "dtype", "torch", "triton", "commit", "passed", "failed", "skipped", "file")
    rows = [
        (
            run["device"], run["dtype"], run["torch"], run["triton"], run["commit"], str(run["passed"]),
            str(run["failed"] + run["error"]), str(run["skipped"]), f"`{path.name}`",
        )
        for path in sorted(RESULTS.glob("test-gpu-*.json"))
        for run in (load(path.name),)
    ]  # fmt: skip
    return table(header, rows)


def fidelity(name: str = FIDELITY) -> str:
    """Every method at every density, against dense videos of the same seeds."""
    run = load(name)
    header = [
        "density",
        "method",
        "threshold",
        "dense steps first",
        "PSNR, dB: mean (worst)",
        "SSIM: mean (worst)",
        "flicker",
    ]
    header += ["digits right", "directions right", "seconds per video"]
    rows = []
    for row in run["rows"]:
        psnr = "equal" if row["psnr_mean"] is None else f"{row['psnr_mean']:.1f} ({row['psnr_worst']:.1f})"
        dense, threshold = str(row.get("dense_steps", "")), ""
        if "threshold" in row:
            begin = f"{3 * row['threshold']:.2f} to " if row["method"].endswith("schedule") else ""  # `lite_methods`
            threshold = f"{begin}{row['threshold']:.2f}"
        ssim = f"{row['ssim_mean']:.4f} ({row['ssim_worst']:.4f})"
        digits = f"{row['digits_right']} of {row['digits_of']}"
        ways = f"{row['directions_right']} of {row['directions_of']}"
        cells = (row["method"], threshold, dense, psnr, ssim, f"{row['flicker']:.2f}", digits, ways)
        cells += (f"{row['seconds']:.2f}",)
        rows.append((f"{row['density']:.3f}", *cells))
    about = f"{run['device']}, {run['dtype']}, torch {run['torch']}, commit {run['commit']}, {run['tokens']:,} tokens"
    about += f", {run['steps']} steps, {len(run['prompts'])} prompts (`benchmarks/results/{name}`)."
    return table(header, rows) + f"\n{about}\n"


def calibration(name: str = CALIBRATION) -> str:
    """Calibrated and constant thresholds on generations that calibration did not see."""
    run = load(name)
    header = ["threshold", "layer-steps within their budget", "within the target", "density", "PSNR, dB: mean"]
    header += ["of it the worst", "reach the target", "seconds per video", "seconds to calibrate"]
    header += ["density less than of a constant with the same PSNR", "sparser on", "cost, in dense generations"]
    constants = run.get("constants", {})
    named = {"-inf": run["nothing_skipped"]} | {f"constant {value}": row for value, row in constants.items()}
    named |= {f"l1 {target}": run["calibrated"][target] for target in sorted(run["calibrated"], key=float)}
    for target, row in run.get("psnr_targets", {}).items():
        named[f"PSNR {target}, {row.get('prompts', len(run['calibration_prompts']))} prompts"] = row
    rows = []
    for label, row in named.items():
        shares = [f"{row[key]:.1%}" if key in row else "" for key in ("within_budget", "within_target")]
        equal = row.get("against_constant")
        gain = f"{equal['gain']:.4f} ± {equal['gain_stdev']:.4f}" if equal else "not bracketed" if "cost" in row else ""
        seeds = f"{equal['seeds_where_sparser']} of {equal['seeds']} seeds" if equal else ""
        cost = f"{row['cost']:.1f}" if "cost" in row else ""
        reach = f"{row['share_met']:.0%}" if "share_met" in row else ""
        time = "" if row["seconds"] != row["seconds"] else f"{row['seconds']:.2f}"
        spent = f"{row['calibration_seconds']:.0f}" if "calibration_seconds" in row else ""
        decibels = (f"{row['mean_psnr']:.1f}", f"{min(row['psnr']):.1f}")
        rows.append((label, *shares, f"{row['mean_density']:.3f}", *decibels, reach, time, spent, gain, seeds, cost))
    about = f"{run['device']}, {run['dtype']}, torch {run['torch']}, commit {run['commit']}, {run['tokens']:,} tokens"
    prompts, seeds = len(run["calibration_prompts"]), len(run["nothing_skipped"]["psnr"])
    about += f", {run['steps']} steps, {prompts} prompts to calibrate, {seeds} held out"
    return table(header, rows) + f"\n{about} (`benchmarks/results/{name}`).\n"


def criteria() -> str:
    """Thresholds of both criteria: what attention loses, and the PSNR of final latents."""
    run = load("compare-criteria-long-h100.json")
    header = ["criterion", "threshold", "density", "attention: relative error", "attention: mean dropped mass"]
    header += ["generation: density", "generation: PSNR of latents, dB"]
    latents = {(row["criterion"], row["threshold"]): row for row in run["latents"]}
    rows = [("max", "-inf", "", "", "", "1.000", f"{latents['max', float('-inf')]['psnr']:.1f}")]
    for row in run["attention"]:
        whole = latents[row["criterion"], row["threshold"]]
        rows.append(
            (
                row["criterion"], f"{row['threshold']:g}", f"{row['density']:.3f}", f"{row['error']:.1e}",
                f"{row['dropped_mean']:.1e}", f"{whole['density']:.3f}", f"{whole['psnr']:.1f}",
            )
        )  # fmt: skip
    given = run["conditions"]
    about = f"{given['device']}, {given['dtype']}, torch {given['torch']}, commit {given['commit']}, "
    about += f"{given['tokens']:,} tokens, {given['steps']} steps, {len(given['prompts'])} prompts "
    return table(header, rows) + f"\n{about}(`benchmarks/results/compare-criteria-long-h100.json`).\n"


TABLES: dict[str, Callable[[], str]] = {
    "attention": attention,
    "attention-sparse": attention_sparse,
    "attention-short": attention_short,
    "attention-short-hundred": lambda: attention_short(ATTENTION_H100),
    "attention-eight-bits": attention_8_bits,
    "break-even": break_even,
    "forward": forward,
    "forward-hundred": lambda: forward(FORWARD_H100),
    "resources": resources,
    "gpu-tests": suites,
    "fidelity": fidelity,
    "fidelity-calibrated": lambda: fidelity(FIDELITY_CALIBRATED),
    "calibration": calibration,
    "calibration-mass": lambda: calibration(CALIBRATION_MASS),
    "criteria": criteria,
}


def fill(page: str) -> str:
    """The text of a page with its tables as the results are now."""
    return _MARKERS.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if a page is not as the results say")
    check = parser.parse_args().check
    stale = [page for page in PAGES if fill(page.read_text()) != page.read_text()]
    said = "differs from benchmarks/results; run make bench-doc" if check else "written"
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {said}")
        if not check:
            page.write_text(fill(page.read_text()))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
