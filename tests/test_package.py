"""The sdist and the wheel made from it contain everything and run where the repository is not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN = """
import pathlib, sys, torch
model = torch.compile(torch.nn.Linear(2, 2), backend="liteattention", options={"inner": "eager"})
with torch.no_grad():
    model(torch.ones(1, 2))
import lite_compile, lite_compile.cli, lite_compile.kernels.select_kernel, lite_compile.passes.find_attention
print(pathlib.Path(lite_compile.__file__).parent.parent)
"""


@pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="the package 'build' is not installed")
def test_sdist_and_wheel(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("lite_compile-*.whl")
    (sdist,) = tmp_path.glob("lite_compile-*.tar.gz")
    assert sdist.stat().st_size > 0

    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    files = {path.relative_to(site).as_posix() for path in site.rglob("*.py")}
    for folder, prefix in (
        ("lite_compile", "lite_compile"),
        ("lite_compile/commands", "lite_compile/commands"),
        ("passes", "lite_compile/passes"),
        ("kernels", "lite_compile/kernels"),
    ):
        assert {f"{prefix}/{path.name}" for path in (ROOT / folder).glob("*.py")} <= files
    assert (site / "lite_compile" / "py.typed").exists()

    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{RUN}"],
        check=False, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip().splitlines()[-1]) == site
