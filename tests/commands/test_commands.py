"""The command line: what it prints, its exit status, and that wrong use ends in one line that says what to do."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lite_compile
from lite_compile import attention_bench
from lite_compile.attention_bench import WrongResultError, bench_attention, imposed_state, interleaved, prove
from lite_compile.cli import main
from lite_compile.commands import doctor, explain
from lite_compile.commands.doctor import Check
from lite_compile.kernels.select_kernel import Kernel, select_kernel
from lite_compile.progress import _counted, progress
from lite_compile.skip_state import TileShape

HERE = Path(__file__).resolve().parent
FACTORY = str(HERE / "my_factory.py")
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


def test_help_lists_the_commands(capsys: Capture) -> None:
    for arguments, status in ((["--help"], 0), ([], 2), (["dance"], 2)):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == status
    said = capsys.readouterr()
    assert all(name in said.out for name in ("doctor", "explain", "report", "calibrate", "bench"))
    assert "invalid choice: 'dance'" in said.err


def test_it_runs_as_a_module_and_is_an_entry_point(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lite_compile", "--version"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("lite-compile ")
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="liteattention")
    assert entry.load() is main


# doctor


def test_doctor_says_what_is_used_here(capsys: Capture) -> None:
    status = main(["doctor"])
    said = capsys.readouterr().out
    assert status == 0, said
    assert "all is well" in said
    assert f"torch:         {torch.__version__}" in said
    assert 'backend="liteattention" is registered: lite_compile.backend.liteattention' in said
    kernel = select_kernel(torch.device("cpu"), torch.float32, 64)
    assert isinstance(kernel, Kernel)
    (row,) = [line for line in said.splitlines() if line.split()[:1] == ["64"]][:1]
    assert row.split()[1:] == ["cpu", f"{kernel.tile.q}x{kernel.tile.k}"] * 3
    assert "cpu, float32: kernel 'cpu' is right: relative error" in said


def test_doctor_fails_where_something_is_wrong(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "entry_points", lambda **_: [])
    monkeypatch.setattr(doctor, "installed_version", lambda _: "not installed")
    monkeypatch.setattr(doctor, "nvidia_smi", lambda _: ["NVIDIA H100"])
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 0)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    wrong = [line for line in said.splitlines() if line.startswith("WRONG")]
    assert len(wrong) == 3
    assert f"{len(wrong)} problems found" in said
    assert "pip install 'triton>=3.6'" in wrong[0]
    assert "is not registered" in wrong[1]
    assert "pip install ." in wrong[1]
    assert "NVIDIA H100" in wrong[2]
    assert "install a build of torch for CUDA" in wrong[2]


def test_checks_of_versions_and_kernels(monkeypatch: Patch) -> None:
    assert doctor.check_version("torch", "2.11.0+cu130").ok
    assert doctor.check_version("torch", "3.0").ok
    assert not doctor.check_version("torch", "2.9.1").ok
    assert "2.9.1 is too old: pip install 'torch>=2.11'" in doctor.check_version("torch", "2.9.1").text
    cpu, kernel = torch.device("cpu"), Kernel("cpu", TileShape(128, 64), 1024)

    def wrong(*_: Any) -> Any:
        raise WrongResultError("relative error 1")

    def broken(*_: Any) -> Any:
        raise OSError("no compiler\nmore")

    monkeypatch.setattr(doctor, "bench_once", wrong)
    assert doctor.try_kernel(cpu, torch.float32, kernel) == Check(
        False, "cpu, float32: kernel 'cpu' computes something wrong (relative error 1); please report it"
    )
    monkeypatch.setattr(doctor, "bench_once", broken)
    assert doctor.try_kernel(cpu, torch.float32, kernel).text.endswith("does not run: OSError: no compiler")
    (check,) = doctor.check_kernels(torch.device("meta"))
    assert not check.ok
    assert "meta has no kernel" in check.text


# explain


def test_explain_prints_the_table(capsys: Capture) -> None:
    assert main(["explain", f"{FACTORY}:make_wan", "--option", "min_seq_len=64", "-o", "exclude_layers=['*.0.*']"]) == 0
    said = capsys.readouterr()
    assert "1 of 4 attention sites rewritten" in said.out
    assert "excluded by the options" in said.out
    assert "making the model" in said.err


def test_explain_imports_from_the_current_folder(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"import sys\nsys.path.append({str(HERE)!r})\nfrom my_factory import make_wan\n")
    command = [sys.executable, "-P", "-m", "lite_compile", "explain", "mine:make_wan"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "2 of 4 attention sites rewritten" in run.stdout


WRONG_EXPLAIN = [
    (["wan"], "'wan' is not MODULE:CALLABLE, such as"),
    ([":make"], "':make' is not MODULE:CALLABLE"),
    (["no_such_module_here:make"], "there is no module 'no_such_module_here' here or in the environment; run this in"),
    (["no_such/file.py:make"], "there is no file 'no_such/file.py'"),
    ([f"{FACTORY}:make_wann"], "Did you mean 'make_wan'?"),
    ([f"{FACTORY}:NOT_CALLABLE"], "is int; allowed: a function that returns (model, kwargs)"),
    ([f"{FACTORY}:make_model_only"], "returned WanTransformer3DModel; allowed: (model, kwargs)"),
    ([f"{FACTORY}:make_wrong_pair"], "returned (int, list); allowed: (model, kwargs)"),
    ([f"{FACTORY}:make_wan", "-o", "threshold"], "--option is 'threshold'; allowed: NAME=VALUE"),
    ([f"{FACTORY}:make_wan", "-o", "treshold=-6"], "Did you mean 'threshold'?"),
    ([f"{FACTORY}:make_wan", "-o", "threshold=6"], "'threshold' is 6; allowed: a number <= 0"),
    (
        [f"{FACTORY}:make_wan", "-o", "threshold={[]: 1}"],
        "'threshold' is '{[]: 1}': there is no such file; allowed: a file of",
    ),
    (["..models:make"], "'..models' is no name of a module"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_EXPLAIN)
def test_explain_errors(arguments: list[str], message: str, capsys: Capture) -> None:
    assert main(["explain", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("liteattention explain: ")
    assert message in said


def test_errors_of_the_users_own_code_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="the user's own"):
        main(["explain", f"{FACTORY}:raise_something"])
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module_either\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_either"):
        main(["explain", f"{broken}:make"])


@pytest.mark.parametrize(
    ("text", "value"),
    [("-6", -6), ("-inf", -float("inf")), ("['a']", ["a"]), ("eager", "eager"), ("True", True), ("None", None)],
)
def test_option_values(text: str, value: Any) -> None:
    assert explain._value(text) == value


# report


def test_report_turns_a_saved_run_into_text_and_a_page(tmp_path: Path, capsys: Capture) -> None:
    saved = lite_compile.save_report(tmp_path / "run.json", title="the run")
    assert main(["report", str(saved)]) == 0
    assert capsys.readouterr().out.startswith("the run, ")
    page = tmp_path / "run.html"
    assert main(["report", str(saved), "-o", str(page)]) == 0
    assert "<h1>the run</h1>" in page.read_text()
    assert f"wrote {page}" in capsys.readouterr().out


def test_report_errors(tmp_path: Path, capsys: Capture) -> None:
    saved = str(lite_compile.save_report(tmp_path / "run.json"))
    other = tmp_path / "other.json"
    other.write_text("{}")
    for arguments, message in (
        ([str(tmp_path / "none.json")], "none.json: No such file or directory"),
        ([str(other)], "allowed: a file of lite_compile.save_report('run.json')"),
        ([saved, "-o", "run.pdf"], "'run.pdf'; allowed: a name that ends with .html"),
        ([saved, "-o", str(tmp_path / "no" / "run.html")], "No such file or directory"),
    ):
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err


# bench


def test_bench_proves_and_times(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    arguments = ["--device", "cpu", "--shape", "2", "2", "500", "32", "--skipped", "0", "50", "--repeats", "2"]
    assert main(["bench", *arguments, "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "B=2 H=2 S=500 D=32 float32, kernel 'cpu'" in said
    record = json.loads(path.read_text())
    assert [row["skipped"] for row in record["rows"]] == [0.0, 0.5]
    for row in record["rows"]:
        assert row["ms"] > 0
        assert row["dense_ms"] > 0
        assert 0 < row["error"] <= 2 * row["dense_error"]
        assert f"{row['ms']:.3f}" in said


def test_bench_gives_no_times_for_a_wrong_result(capsys: Capture, monkeypatch: Patch) -> None:
    right = attention_bench._Problem.ours
    monkeypatch.setattr(attention_bench._Problem, "ours", lambda self: right(self) * 1.001)
    assert main(["bench", "--device", "cpu", "--shape", "1", "2", "256", "32"]) == 1
    said = capsys.readouterr().out
    assert "wrong result in batch entry 0, head 0: relative error 0.001" in said
    assert "dense / ours" not in said


def test_bench_errors(capsys: Capture) -> None:
    for arguments, message in (
        (["--device", "abacus"], "--device is 'abacus'"),
        (["--device", "meta"], "--device is 'meta'; allowed: cpu, cuda"),
        (["--device", "cpu", "--kernel", "hopper"], "no kernel for torch.float32"),
        (
            ["--device", "cpu", "--shape", "1", "1", "64", "64", "--repeats", "1", "--json", "/nope/x"],
            "/nope/x: No such",
        ),
    ):
        assert main(["bench", *arguments]) == 2
        assert message in capsys.readouterr().err
    for arguments, message in (
        (["--shape", "1", "1", "0", "64"], "'0' is not an integer from 1 on"),
        (["--skipped", "100"], "'100' is not a number from 0 to below 100"),
    ):
        with pytest.raises(SystemExit):
            main(["bench", *arguments])
        assert message in capsys.readouterr().err


def test_the_imposed_mask_is_what_is_skipped() -> None:
    """The proof can fail: a result without any skipping, or with another mask, is not accepted."""
    torch.manual_seed(0)
    shape, tile = (1, 2, 300, 16), TileShape(128, 64)
    q, k, v = torch.randn(3, *shape)
    _, mask = imposed_state(shape, tile, 0.4)
    assert mask.sum(-1).unique().tolist() == [2]
    keep = ~mask.repeat_interleave(128, 2).repeat_interleave(64, 3)[..., :300, :300]
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    ours, theirs = prove(q, k, v, mask, tile, right)
    assert ours == pytest.approx(theirs, rel=0.5)
    with pytest.raises(WrongResultError, match="that of PyTorch is"):
        prove(q, k, v, mask, tile, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    with pytest.raises(WrongResultError):
        prove(q, k, v, mask, tile, right.nan_to_num(0).index_fill(1, torch.tensor([1]), float("nan")))


def test_bench_row_of_one_call() -> None:
    kernel = select_kernel(torch.device("cpu"), torch.float32, 32)
    assert isinstance(kernel, Kernel)
    row = bench_attention((1, 1, 512, 32), torch.float32, torch.device("cpu"), kernel, 0.25, 1)
    assert row.skipped == 0.25
    assert len(interleaved([lambda: None, lambda: None, lambda: None], 2)) == 3


def test_progress_yields_everything(capsys: Capture, monkeypatch: Patch) -> None:
    assert list(progress([1, 2, 3], "numbers")) == [1, 2, 3]
    assert capsys.readouterr().err == ""  # no terminal, no bar
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(_counted("ab", "letters")) == ["a", "b"]
    assert "letters: 2 of 2" in capsys.readouterr().err


# calibrate


def test_calibrate_writes_a_file(capsys: Capture, tmp_path: Path) -> None:
    out = tmp_path / "wan.toml"
    assert main(["calibrate", f"{FACTORY}:make_run", "--target-error", "0.02", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "l1 error up to 0.02" in said
    assert "100.0% of the layers' steps within their budget" in said
    assert lite_compile.load_calibration(out).layers[0][0] == "blocks.0.attn1"


def test_calibrate_for_a_psnr_with_prompts_held_out(capsys: Capture, tmp_path: Path) -> None:
    arguments = ["calibrate", f"{FACTORY}:make_run", "--target-psnr", "40", "--held-out", "1"]
    assert main([*arguments, "--out", str(tmp_path / "wan.toml")]) == 0
    assert "psnr (held out)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["make_run_without_compiling"], "no attention of WanTransformer3DModel ran through liteattention"),
        (["make_wrong_pair"], r"returned \(int, list\); allowed: \(model, run\) or \(model, run, prompts\)"),
        (["make_run", "--target-error", "7"], "target_error is 7.0; allowed: a number above 0, at most 1"),
        (["make_run", "--held-out", "2", "--target-psnr", "9"], "--held-out is 2; allowed: fewer than the 2 prompts"),
        (["make_runn"], "has no 'make_runn'. Did you mean 'make_run'"),
        (["NOT_CALLABLE"], r"allowed: a function that returns \(model, run\)"),
    ],
)
def test_calibrate_says_what_is_wrong(capsys: Capture, tmp_path: Path, arguments: list[str], message: str) -> None:
    name, *rest = arguments
    assert main(["calibrate", f"{FACTORY}:{name}", *rest, "--out", str(tmp_path / "x.toml")]) == 2
    assert re.search(message, capsys.readouterr().err)
