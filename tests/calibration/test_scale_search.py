"""The search for a scale on curves of quality that are known."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from lite_compile.calibration.scale_search import (
    COARSE,
    EVALUATIONS,
    FAR,
    MOST,
    NEAR,
    ScaleSearch,
    Trial,
    crossing,
)
from lite_compile.calibration.target import QualityTarget

TARGET = QualityTarget("psnr", 30.0, None)
Curve = Callable[[float], float]


class Prompts:
    """Generations whose quality is `curve(log2 of the scale)`, higher or lower by prompt, and noisy."""

    def __init__(self, curve: Curve, spread: Sequence[float] = (0.0,), noise: float = 0.0, seed: int = 0) -> None:
        self._curve, self._spread, self._noise, self._seed = curve, spread, noise, seed
        self.asked: list[tuple[float, int]] = []

    def value(self, x: float, number: int) -> float:
        value = self._curve(x) + self._spread[number]
        if self._noise:
            value += self._noise * float(np.random.default_rng([self._seed, number, hash(x) % 2**32]).normal())
        return value

    def evaluate(self, x: float, order: Sequence[int], whole: bool) -> dict[int, float]:
        values: dict[int, float] = {}
        for number in order:
            values[number] = self.value(x, number)
            self.asked.append((x, number))
            if values[number] < TARGET.value and not whole:
                break
        return values

    def search(
        self, target: QualityTarget = TARGET, same: Callable[[float, float], bool] = float.__eq__
    ) -> ScaleSearch:
        return ScaleSearch(target, len(self._spread), self.evaluate, same)

    @property
    def cost(self) -> float:
        """Generations per prompt."""
        return len(self.asked) / len(self._spread)


def boldest(prompts: Prompts, count: int) -> float:
    """The largest scale, to 0.01, whose bound meets the target, by bisection; without noise."""
    low, high = -40.0, 40.0
    while high - low > 0.01:
        x = (low + high) / 2
        met = TARGET.bound([prompts.value(x, n) for n in range(count)]) >= TARGET.value
        low, high = (x, high) if met else (low, x)
    return low


@pytest.mark.parametrize("slope", [3.0, 6.0, 12.0])
@pytest.mark.parametrize("offset", [-18.0, -7.0, 0.0, 5.0, 20.0])
@pytest.mark.parametrize("spread", [(0.0,), (1.0, -1.0), (2.0, -1.0, -2.5), (3.0, 1.0, 0.0, -1.0, -4.0)])
def test_without_noise_three_evaluations_do(slope: float, offset: float, spread: tuple[float, ...]) -> None:
    prompts = Prompts(lambda x: 30 + offset - slope * x, spread)
    best = prompts.search().find()
    assert best.met
    assert TARGET.bound(list(best.values.values())) >= TARGET.value
    assert -0.01 <= boldest(prompts, len(spread)) - best.scale < 2 * NEAR + 0.01
    assert prompts.cost <= (2 if slope == 6 else 3)


def stairs(slope: float, offset: float) -> Curve:
    """Flat in half of every 4 units, twice as steep between."""

    def curve(x: float) -> float:
        steps, within = divmod(x, 4.0)
        return 30 + offset - slope * (4 * steps + 2 * max(0.0, within - 2))

    return curve


@pytest.mark.parametrize("slope", [3.0, 6.0, 12.0])
@pytest.mark.parametrize("shape", ["straight", "stairs"])
def test_with_noise_the_target_is_met_at_little_cost(slope: float, shape: str) -> None:
    costs, lost = [], []
    for seed in range(60):
        draw = np.random.default_rng(seed)
        offset = float(draw.uniform(-18, 18))
        curve = stairs(slope, offset) if shape == "stairs" else (lambda x, offset=offset: 30 + offset - slope * x)
        spread = draw.normal(0, 2, 3).tolist()
        prompts = Prompts(curve, spread, noise=0.5, seed=seed)
        best = prompts.search().find()
        met = TARGET.bound([prompts.value(best.scale, n) for n in range(3)]) >= TARGET.value
        assert best.met
        assert met  # of the values themselves, not of what the search says
        assert len({x for x, _ in prompts.asked}) <= MOST
        costs.append(prompts.cost)
        lost.append(boldest(Prompts(curve, spread), 3) - best.scale)
    assert statistics.mean(costs) < EVALUATIONS
    assert statistics.median(lost) < 1.0


def test_the_sparsest_that_met_the_target_is_the_result() -> None:
    prompts = Prompts(lambda x: 34 - 6 * x, (1.0, -1.0, 0.5), noise=1.0, seed=4)
    search = prompts.search()
    best = search.find()
    assert best == max((trial for trial in search.trials if trial.met), key=lambda trial: trial.scale)
    assert len(search.trials) > 1


def test_a_trial_that_misses_begins_with_the_worst_prompt_and_ends_there() -> None:
    prompts = Prompts(lambda x: 62.0 - x if x < 1 else 30.0, (2.0, -6.0, 1.0))
    prompts.search().find()
    trials = {x: [n for _, n in group] for x, group in itertools.groupby(prompts.asked, key=lambda asked: asked[0])}
    first, *others = trials.values()
    assert first == [0, 1, 2]  # in full: it shows how prompts differ
    assert [1] in others
    assert all(order[0] == 1 for order in others)


def test_a_target_out_of_reach_raises_after_a_bounded_number_of_scales() -> None:
    prompts = Prompts(lambda x: 20.0 - min(x, 0.0) / 100)
    with pytest.raises(ValueError, match=r"target_psnr is 30: .*most careful ones gave 20\."):
        prompts.search().find()
    assert len(prompts.asked) == MOST
    assert min(x for x, _ in prompts.asked) < -20
    assert len({x for x, _ in prompts.asked}) == MOST


def scales(prompts: Prompts) -> list[float]:
    """Those that are tried, in order, whether or not one meets the target."""
    search = prompts.search()
    with contextlib.suppress(ValueError):
        search.find()
    return [trial.scale for trial in search.trials]


def test_moves_grow_where_predictions_fail_but_not_without_bound() -> None:
    close = scales(Prompts(lambda x: 29.9))
    moves = [a - b for a, b in itertools.pairwise(close)]
    assert moves[0] == NEAR
    assert moves[EVALUATIONS - 1 :] == pytest.approx([COARSE, 2 * COARSE, 4 * COARSE, 8 * COARSE])
    far = scales(Prompts(lambda x: -math.inf))
    assert max(a - b for a, b in itertools.pairwise(far)) == FAR


def test_more_than_the_usual_evaluations_only_while_an_octave_may_be_left() -> None:
    """One prompt, whose quality falls off a cliff: what is known then is only on which side of it a scale was."""
    counts = set()
    for cliff in np.linspace(0.5, 20, 40):
        tried = scales(Prompts(lambda x, cliff=cliff: 60.0 if x < cliff else 10.0))
        counts.add(len(tried))
        left = [
            min([x for x in tried[:count] if x >= cliff], default=math.inf) - max(x for x in tried[:count] if x < cliff)
            for count in range(1, len(tried) + 1)
        ]
        assert left[-1] < COARSE or len(tried) == MOST
        assert min(left[EVALUATIONS - 1 : -1], default=COARSE) >= COARSE
    assert min(counts) == EVALUATIONS == 4
    assert max(counts) > EVALUATIONS


def test_what_is_expected_to_be_hardly_bolder_is_not_tried() -> None:
    assert scales(Prompts(lambda x: 31.8 - 6 * x)) == [0]  # the next would be 0.18


def test_between_what_met_the_target_and_what_did_not_a_quarter_is_left_on_either_side() -> None:
    first, met, next_one, *_ = scales(Prompts(lambda x: 31.9 if x < -0.5 else 20.0))
    assert first == 0
    assert next_one == pytest.approx(met - met / 4)  # the line through both comes down to the target right beside it


def test_it_ends_where_no_thresholds_are_left() -> None:
    prompts = Prompts(lambda x: 30 + 12 * max(0.0, -x))
    always = prompts.search(same=lambda a, b: True)
    assert always.find() == Trial(0.0, {0: 30.0}, True)
    equal = Prompts(lambda x: math.inf, (0.0, 0.0))
    best = equal.search(same=lambda a, b: min(a, 15.0) == min(b, 15.0)).find()
    assert 15 <= best.scale <= 16
    assert equal.cost == 3
    broken = Prompts(lambda x: 60.0 if x < -3 else -math.inf, (0.0, 0.0))
    assert -16 < broken.search().find().scale < -3


def test_a_prompt_whose_generations_stay_the_same_does_not_hide_the_others() -> None:
    prompts = Prompts(lambda x: 40 - 6 * x, (math.inf, 0.0, 1.0))
    best = prompts.search().find()
    assert best.met
    assert -0.01 <= boldest(prompts, 3) - best.scale < 2 * NEAR
    assert prompts.cost <= EVALUATIONS


def test_ssim_whose_error_is_quadratic() -> None:
    target = QualityTarget("ssim", 0.9, None)
    prompts = Prompts(lambda x: 1 - 0.4 * 4**x)
    best = prompts.search(target).find()
    assert best.scale == pytest.approx(-1 - NEAR / 2)
    assert prompts.cost == 2


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.0, 2.0)], 2.0),
        ([(0.0, 2.0), (1.0, 1.0)], 2.0),
        ([(0.0, 2.0), (1.0, -2.0)], 0.5),
        ([(0.0, 8.0), (1.0, 2.0), (3.0, -4.0)], 1 + 2 / 3),  # between the two around, not through the steep part
        ([(0.0, 3.0), (1.0, 2.0), (3.0, -4.0)], 1 + 2 / 3),  # though the other one is nearer
        ([(0.0, 1.0), (1.0, 1.0)], 4.0),  # as flat as is believed
        ([(0.0, 1.0), (0.1, 0.5)], 0.1 + 0.5 / 4.0),  # as steep
        ([(0.0, 1.0), (1.0, 2.0)], 4.0),  # rising is noise
    ],
)
def test_crossing(points: list[tuple[float, float]], expected: float) -> None:
    assert crossing(points, 0.0) == pytest.approx(expected)
