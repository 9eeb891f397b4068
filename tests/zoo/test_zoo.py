"""Every model of the zoo: what is rewritten, and that it computes what the model does."""

from __future__ import annotations

import models_doc
import pytest
import torch
from zoo_model import ZooModel
from zoo_models import ZOO
from zoo_runs import Observation, compile_model, generate, generate_alone, observe

import lite_compile

TOLERANCE = 1e-5
"""Relative distance in fp32, where scores are some ten times as large as those of trained models."""
GENERATED_IN_CI = {
    "WanTransformer3DModel-Wan-2-1",
    "WanTransformer3DModel-Wan-2-2-5B",
    "HunyuanVideo15Transformer3DModel",
    "LTX2VideoTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "LatteTransformer3DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel-dev",
    "Lumina2Transformer2DModel",
    "ZImageTransformer2DModel",
    "DiT-examples-dits-not-fused",
}
THROUGH_INDUCTOR = [
    "WanTransformer3DModel-Wan-2-1",
    "CogVideoXTransformer3DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel-schnell",
    "PixArtTransformer2DModel",
    "VideoDiT-examples-dits",
]


@pytest.fixture(scope="module", params=ZOO)
def observed(request: pytest.FixtureRequest) -> tuple[ZooModel, Observation]:
    """One model after the other: all tests of one share its observation."""
    zoo = ZOO[request.param]
    return zoo, observe(zoo)


def distance(observation: Observation) -> float:
    """Between a model that was rewritten and the model itself, relative, in the L2 norm."""
    return float((observation.sparse - observation.dense).norm() / observation.dense.norm())


def test_sites_and_reasons(observed: tuple[ZooModel, Observation]) -> None:
    zoo, report = observed[0], observed[1].report
    found = (len(report.rewritten), report.reasons(), len(report.graphs))
    assert found == (zoo.rewritten, zoo.dense, zoo.graphs), f"{models_doc.numbers(report)}\n{report}"


def test_skipping_nothing_is_the_model_itself(observed: tuple[ZooModel, Observation]) -> None:
    assert distance(observed[1]) < TOLERANCE


def test_the_row_of_the_documentation_is_up_to_date(observed: tuple[ZooModel, Observation]) -> None:
    row = models_doc.row(observed[0], observed[1].report)
    assert row in models_doc.PATH.read_text().splitlines(), "make models-doc"


def test_the_documentation_has_these_models_and_no_others() -> None:
    text = models_doc.PATH.read_text()
    assert text.startswith(models_doc.HEADER)
    rows = [row.split(" | ")[:2] for row in text.removeprefix(models_doc.HEADER).splitlines()]
    assert rows == [[f"| {zoo.class_name}", zoo.variant] for zoo in ZOO.values()]
    assert len({zoo.class_name for zoo in ZOO.values()}) >= 22


def slow_or_not(name: str) -> object:
    return pytest.param(name, marks=[] if name in GENERATED_IN_CI else pytest.mark.slow)


@pytest.mark.parametrize("name", list(map(slow_or_not, ZOO)))
def test_a_second_generation_is_like_the_first_one_of_a_new_model(name: str) -> None:
    zoo = ZOO[name]
    model = zoo.make()
    compiled = compile_model(model, threshold=-1.0)
    generate(zoo, compiled, 1)
    second, stats = generate(zoo, compiled, 2), lite_compile.stats(model)
    if zoo.rewritten:
        assert {(stream.generations, stream.steps) for stream in stats.streams} == {(2, 6)}
        assert (stats.density < 1) == zoo.skips
    assert torch.equal(second, generate_alone(name, 2))


@pytest.mark.parametrize("name", THROUGH_INDUCTOR)
def test_through_inductor(name: str) -> None:
    observation = observe(ZOO[name], inner="inductor")
    assert len(observation.report.rewritten) == ZOO[name].rewritten
    assert distance(observation) < TOLERANCE
