"""Wrong arguments of the examples end in one line on stderr, not in a traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import demo
import look_inside
from moving_digits import evaluate, generate, metrics, train

NO_WEIGHTS, NOT_WEIGHTS = ["--weights", "/nope"], ["--weights", __file__]
WRONG: list[tuple[Any, list[str], str]] = [
    (generate, NO_WEIGHTS, "no weights at /nope"),
    (generate, NOT_WEIGHTS, "not a file of safetensors"),
    (generate, ["--weights", str(metrics.WEIGHTS)], "names no setting"),
    (generate, ["--steps", "1"], "--steps: '1' is not an integer from 2"),
    (generate, ["--steps", "9" * 30], "--steps: '999"),
    (generate, ["--guidance", "nan"], "--guidance: 'nan' is not a finite number"),
    (generate, ["--seed", "-1"], "--seed: '-1'"),
    (generate, ["--threshold", "1"], "threshold"),
    (generate, ["--prompt", "left"], "'left' in 'left' is not a digit; allowed: 0, 1"),
    (generate, ["--backend", "abacus"], "invalid choice: 'abacus'"),
    (generate, ["--backend", "eager", "eager"], "argument --backend: each at most once, not eager eager"),
    (generate, ["--output", __file__], "File exists"),
    (evaluate, ["prompts", *NO_WEIGHTS], "no weights at /nope"),
    (evaluate, ["prompts", *NOT_WEIGHTS], "not a file of safetensors"),
    (evaluate, ["prompts", "--every", "0"], "--every: '0' is not an integer from 1"),
    (evaluate, ["prompts", "--batch", "0"], "--batch"),
    (evaluate, ["prompts", "--steps", "0"], "--steps"),
    (evaluate, ["prompts", "--pairs", "-1"], "--pairs: '-1' is not an integer from 0"),
    (evaluate, ["prompts", "--flow-shift", "0"], "--flow-shift: '0' is not above 0"),
    (evaluate, ["prompts", "--output", __file__], "File exists"),
    (metrics, NO_WEIGHTS, "no classifier at /nope"),
    (metrics, NOT_WEIGHTS, "was not written by metrics.py"),
    (metrics, ["--videos", "0"], "--videos"),
    (metrics, ["--steps", "x"], "--steps: 'x'"),
    (metrics, ["--device", "abacus"], "--device: 'abacus'"),
    (metrics, ["--digits", "/nope"], "there is no file '/nope'"),
    (metrics, ["--digits", __file__], "could not convert"),
    (metrics, ["--train-classifier", "--weights", "/"], "/ is a folder"),
    (train, ["--batch", "0"], "--batch"),
    (train, ["--matrix-rate", "-1"], "--matrix-rate"),
    (train, ["--init", "/nope"], "there is no file '/nope'"),
    (train, ["--init", __file__], "not a file of safetensors"),
    (train, ["--init", str(metrics.WEIGHTS)], "names no setting"),
    (train, ["--digits", __file__], "could not convert"),
    (train, ["--minutes", "nan"], "--minutes: 'nan' is not a finite number"),
    (train, ["--minutes", "0"], "--minutes: '0' is not above 0"),
    (train, ["--output", __file__], "File exists"),
    (look_inside, ["--threshold", "1"], "threshold"),
    (look_inside, ["--head", "4"], "--head: invalid choice: 4"),
    (look_inside, ["--output", __file__], "File exists"),
    (demo, ["--steps", "1"], "--steps: '1' is not an integer from 2"),
]


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    WRONG,
    ids=[f"{p.__name__}-{'-'.join(Path(a).name for a in arguments)}" for p, arguments, _ in WRONG],
)
def test_wrong_arguments_are_named(
    program: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)  # default output folders
    with pytest.raises(SystemExit) as caught:
        program.main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err.partition("error: ")[2]
    assert message in said
    assert arguments[-2] in said  # the option


def test_right_arguments(tmp_path: Path) -> None:
    given = ["thresholds", "--steps", "5", "--seed", "7", "--pairs", "0", "--output", str(tmp_path / "new")]
    args = evaluate.parse_arguments(given)
    assert (args.steps, args.seed, args.pairs) == (5, 7, 0)
    assert args.output.is_dir()
    assert train.parse_arguments(["--device", "cpu", "--steps", "3"]).device == torch.device("cpu")
    assert train.parse_arguments([]).device is None
