"""The comparison of criteria: what it reads off a curve, and that replayed masks are the op's."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from compare_criteria import Replay, Variant, compare, density_at
from moving_digits.pipeline import SETTINGS

from lite_compile.skip_state import skipped_tiles


def test_density_at_an_error() -> None:
    points = [(1.0, 0.9), (3.0, 0.5), (2.0, 0.8)]
    assert density_at(points, 1.5) == pytest.approx(0.85)
    assert density_at(points, 2.5) == pytest.approx(0.65)
    assert density_at(points, 0.5) is density_at(points, 3.5) is None


def test_criteria_are_compared_at_equal_errors() -> None:
    points = [("max", -4.0, 0.01, 0.9), ("max", -2.0, 0.1, 0.5), ("mass", -2.0, 0.01, 0.8), ("max", -1e9, 0.0, 1.0)]
    rows = [dict(zip(("criterion", "threshold", "error", "density"), point, strict=True)) for point in points]
    (found,) = compare(rows, "error", [0.1**1.5], log=True)
    assert found["max"] == pytest.approx(0.7)
    assert found["mass"] is None


def test_replay_measures_density_error_and_dropped_mass() -> None:
    """Two layers and two streams take turns; each has a mask of its own."""
    setting = replace(SETTINGS["small"], frames=2, side=64, layers=2, heads=1)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, setting.tokens, 64) for _ in range(3))
    k[:, :, 256:] *= 0.5
    bold, careful = Variant("max", -0.5), Variant("mass", -100.0)
    with Replay(setting, [bold, careful], streams=2, every=2) as replay:
        for _ in range(2):
            for stream in (0, 1):
                skipped = (
                    skipped_tiles(replay.states[0, 0, bold][0], 1, setting.tokens // 64) if replay.calls == 4 else None
                )
                for _ in ("layer 0", "layer 1"):
                    F.scaled_dot_product_attention(q * (8 if stream == 0 else 0.1), k, v)
                if skipped is not None:
                    lost = skipped
    assert {(row["layer"], row["stream"], row["step"]) for row in replay.rows} == {
        (0, s, t) for s in (0, 1) for t in (0, 1)
    }
    found = {(row["criterion"], row["stream"], row["step"]): row for row in replay.rows}
    for key in (("max", 0, 0), ("max", 1, 1), ("mass", 0, 1)):
        assert found[key]["density"] == 1
        assert found[key]["error"] < 1e-6
        assert abs(found[key]["dropped_max"]) < 1e-5
    measured = found["max", 0, 1]
    weights = torch.softmax(8 * q.double() @ k.double().mT / 8, -1)
    dropped = (weights.unflatten(-1, (-1, 64)).sum(-1) * lost.repeat_interleave(128, 2)).sum(-1)
    kept = ~lost.repeat_interleave(128, 2).repeat_interleave(64, 3)
    sparse = torch.softmax(torch.where(kept, q.double() @ k.double().mT, -torch.inf), -1) @ v.double()
    dense = weights @ v.double()
    assert measured["density"] == pytest.approx(1 - float(lost.float().mean()))
    assert 0.1 < measured["density"] < 0.9
    assert measured["dropped_mean"] == pytest.approx(float(dropped.mean()), rel=1e-3)
    assert measured["dropped_max"] == pytest.approx(float(dropped.max()), rel=1e-3)
    assert measured["error"] == pytest.approx(float((sparse - dense).norm() / dense.norm()), rel=1e-3)
