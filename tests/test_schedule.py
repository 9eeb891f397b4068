"""Schedules: what they are at each fraction, as tables and as read in the graph, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_compile import OptionTypeError, OptionValueError, Schedule
from lite_compile.ops import NOW_FRACTION, NOW_WORDS
from lite_compile.options import Options
from lite_compile.schedule import LayerThresholds, as_thresholds, check_threshold
from lite_compile.threshold_table import COLUMNS, POINTS, empty_table, read_thresholds, threshold_table


def now_at(fraction: float) -> torch.Tensor:
    now = torch.zeros(NOW_WORDS, dtype=torch.int32)
    now[NOW_FRACTION] = torch.tensor(fraction).view(torch.int32)
    return now


def read(value: Any, fraction: float, layers: tuple[str, ...] = ("blocks.0.attn1",)) -> list[float]:
    table = threshold_table(as_thresholds(check_threshold("threshold", value)), layers)
    assert table.shape == (len(layers), COLUMNS)
    return read_thresholds(table, now_at(fraction)).tolist()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (-10, [-10.0, -10.0, -10.0, -10.0]),
        (-math.inf, [-math.inf] * 4),
        (Schedule.constant(-6.3), [-6.3] * 4),
        (Schedule.linear(-16, -4), [-16.0, -13.0, -10.0, -4.0]),
        (Schedule.cosine(-16.0, -4.0), [-16.0, -10 - 6 * math.cos(math.pi / 4), -10.0, -4.0]),
        ([-16.0, -8.0, -6.0, -5.0, -4.0], [-16.0, -8.0, -6.0, -4.0]),
        (Schedule.points([-20.0, -4.0]), [-20.0, -16.0, -12.0, -4.0]),
        (Schedule.points({0: -20.0, 0.5: -12.0, 1: 0}), [-20.0, -16.0, -12.0, 0.0]),
        ([-math.inf, -4.0], [-math.inf, -math.inf, -math.inf, -4.0]),
        ([-4.0, -math.inf, -math.inf], [-4.0, -math.inf, -math.inf, -math.inf]),
    ],
    ids=str,
)
def test_thresholds_along_the_trajectory(value: Any, expected: list[float]) -> None:
    """At a quarter, a half and both ends; on the host and as the graph reads them."""
    schedule = as_thresholds(check_threshold("threshold", value)).schedule("any")
    for fraction, threshold in zip((0.0, 0.25, 0.5, 1.0), expected, strict=True):
        assert schedule.at(fraction) == pytest.approx(threshold, abs=1e-12)
        assert read(value, fraction) == pytest.approx([threshold], rel=1e-6)


@pytest.mark.parametrize("value", [-10.0, -6.3, -0.1, 0, -math.inf])
@pytest.mark.parametrize("fraction", [0.0, 1e-9, 0.123456, 0.5, 0.99999994, 1.0, -1.0])
def test_a_constant_is_the_same_number_everywhere(value: float, fraction: float) -> None:
    assert read(value, fraction) == [float(torch.tensor(float(value)))]


@pytest.mark.parametrize("fraction", [-1.0, -math.inf, math.nan])
def test_an_unknown_fraction_gets_the_most_careful_threshold(fraction: float) -> None:
    layers = {"*": [-5.0, -12.0, -3.0], "a": -7.0, "b": Schedule.linear(-4, -9)}
    assert read(layers, fraction, ("x", "a", "b")) == [-12.0, -7.0, -9.0]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    fraction=st.floats(0, 1, width=32),
    values=st.lists(st.floats(-40, 0) | st.just(-math.inf), min_size=2, max_size=60),
)
def test_what_the_graph_reads_lies_between_its_points(fraction: float, values: list[float]) -> None:
    schedule = Schedule.points(values)
    (found,) = read(values, fraction)
    left = math.floor(fraction * (POINTS - 1)) / (POINTS - 1)
    ends = [schedule.at(left), schedule.at(min(1.0, left + 1 / (POINTS - 1)))]
    assert min(ends) - 1e-5 <= found <= max(ends) + 1e-5


def test_globs_choose_in_their_order_and_the_star_is_for_the_rest() -> None:
    value = {"*": -10, "blocks.0.*": -20.0, "blocks.?.attn1": [-8.0, -4.0], "other": Schedule.linear(-3, -1)}
    layers = ("blocks.0.attn1", "blocks.1.attn1", "other", "blocks.10.attn1")
    assert read(value, 0.5, layers) == [-20.0, -6.0, -2.0, -10.0]


def test_an_empty_table_marks_nothing() -> None:
    table = empty_table(3, torch.device("cpu"))
    assert all(math.isnan(x) for fraction in (0.0, 0.3, -1.0) for x in read_thresholds(table, now_at(fraction)))


def test_equal_schedules_are_equal_and_say_how_they_were_made() -> None:
    assert Schedule.linear(-16, -4) == Schedule.points([-16.0, -4]) != Schedule.linear(-16, -5)
    assert hash(Schedule.linear(-16, -4)) == hash(Schedule.points([-16.0, -4]))
    assert str(Schedule.cosine(-16, -4.0)) == "Schedule.cosine(-16, -4.0)"
    assert Options(threshold={"*": -3}).threshold == LayerThresholds((), Schedule.constant(-3.0))
    assert Options(threshold=[-3, -2]).thresholds == Schedule.linear(-3, -2)


@pytest.mark.parametrize(
    ("make", "kind", "parts"),
    [
        (lambda: Schedule.linear(1, -4), OptionValueError, ["threshold", "1", "<= 0"]),
        (lambda: Schedule.linear(-4, "x"), OptionTypeError, ["threshold", "'x'", "number"]),  # type: ignore[arg-type]
        (lambda: Schedule.cosine(-math.inf, -4), OptionValueError, ["threshold", "inf", "finite"]),
        (lambda: Schedule.points([-4.0]), OptionValueError, ["threshold", "[-4.0]", "two or more"]),
        (lambda: Schedule.points({0.1: -4.0, 1.0: -3}), OptionValueError, ["(0.1, 1.0)", "rise from 0 to 1"]),
        (lambda: Schedule.points({}), OptionValueError, ["()", "rise from 0 to 1"]),
        (lambda: Schedule.points({"a": -4.0}), OptionTypeError, ["'a'", "by fraction"]),  # type: ignore[dict-item]
        (lambda: Schedule((0, 0.5, 0.5, 1), (-1, -1, -1, -1)), OptionValueError, ["0.5, 0.5", "rise"]),
        (lambda: Schedule((0, 1), (-1,)), OptionValueError, ["as many fractions as thresholds"]),
        (lambda: Schedule((0, math.nan, 1), (-1, -1, -1)), OptionValueError, ["nan", "rise"]),
        (lambda: Schedule.points(5), OptionTypeError, ["5 (int)", "in a list"]),  # type: ignore[arg-type]
        (lambda: Schedule.points({False: -4, True: -3}), OptionTypeError, ["False", "by fraction"]),
        (lambda: Schedule((0, "x", 1), (-1, -1, -1)), OptionTypeError, ["'x'", "0 to 1"]),  # type: ignore[arg-type]
        (lambda: Schedule((0, 1), None), OptionTypeError, ["None", "tuple"]),  # type: ignore[arg-type]
    ],
)
def test_wrong_schedules_raise(make: Callable[[], Schedule], kind: type[Exception], parts: list[str]) -> None:
    with pytest.raises(kind) as caught:
        make()
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("fraction", [-0.5, 1.5, math.nan])
def test_there_is_no_threshold_beyond_the_trajectory(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"fraction is .*; allowed: 0 to 1"):
        Schedule.linear(-4, -3).at(fraction)


def test_the_table_is_on_the_cpu_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        table = threshold_table(Schedule.linear(-7.625, -3), ("a layer of this test",))
    assert table[0, 0] == -7.625
