"""Spellings that users register, among them the one that docs/spellings.md shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import OPTIONS, Denoiser, capture, inputs, run_both
from torch import Tensor, fx

import lite_compile
from lite_compile import AttentionSite, Declined, Reason, Spelling, plan
from lite_compile.backend import rewrite_graph
from lite_compile.passes.find_attention import find_attention
from lite_compile.passes.spelling_registry import registered_spellings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "spellings.md"


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    yield
    for spelling in registered_spellings():
        lite_compile.unregister_spelling(spelling)


class Sigmoid(Spelling):
    """`sigmoid(q @ k^T) @ v`, taken for attention."""

    name = "sigmoid"

    def __init__(self, name: str = "sigmoid", declined: Any = None) -> None:
        self.name = name
        self.declined = declined

    def pattern(self, node: fx.Node) -> Any:
        if node.target != "sigmoid":
            return None
        (out,) = node.users
        scores = node.args[0]
        return AttentionSite(out, scores.args[0], plan("transpose", scores.args[1], -1, -2), out.args[1], inner=(node,))  # type: ignore[union-attr]

    def check(self, site: AttentionSite) -> Any:
        return self.declined


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).sigmoid() @ v


@pytest.mark.parametrize("by_packet", [False, True])
def test_the_example_of_the_documentation(by_packet: bool) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    packed = torch.ops.mylib.packed_attention if by_packet else names["packed_attention"]
    assert [spelling.name for spelling in registered_spellings()] == ["mylib::packed_attention"]

    def attend(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
        qkv = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1)
        result: Tensor = packed(qkv, q.shape[1], window).unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
        return result

    dense, sparse = run_both(Denoiser(attend), batch=2)
    torch.testing.assert_close(sparse, dense)
    _, _, report = rewrite_graph(capture(Denoiser(lambda q, k, v: attend(q, k, v, 8)), *inputs()), OPTIONS)
    assert [(site.reason, site.detail) for site in report.sites] == [(Reason.VARIANT, "window=8")]
    lite_compile.unregister_spelling("mylib::packed_attention")
    assert find_attention(capture(Denoiser(attend), *inputs())) == []


def test_registered_spellings_are_found_until_they_are_unregistered() -> None:
    gm = capture(Denoiser(sigmoid), *inputs())
    assert find_attention(gm) == []
    spelling = lite_compile.register_spelling(Sigmoid())
    (site,) = find_attention(gm)
    assert site.spelling is spelling
    assert site.layer == "attn"
    lite_compile.unregister_spelling(spelling)
    assert find_attention(gm) == []


def test_registered_spellings_come_before_ours_and_the_latest_first() -> None:
    class Sdpa(Spelling):
        def __init__(self, name: str) -> None:
            self.name = name

        def pattern(self, node: fx.Node) -> AttentionSite | None:
            if node.target is not torch._C._nn.scaled_dot_product_attention:
                return None
            return AttentionSite(node, *node.args[:3])

    gm = capture(Denoiser(lambda q, k, v: F.scaled_dot_product_attention(q, k, v)), *inputs())
    first, second = Sdpa("first"), Sdpa("second")
    for spelling in (first, second):
        lite_compile.register_spelling(spelling)
        (site,) = find_attention(gm)
        assert site.spelling is spelling
    lite_compile.unregister_spelling("second")
    (site,) = find_attention(gm)
    assert site.spelling is first


@pytest.mark.parametrize(
    ("spelling", "kind", "parts"),
    [
        (Sigmoid, TypeError, ["class Sigmoid", "Sigmoid()"]),
        (lambda node: None, TypeError, ["function", "lite_compile.Spelling"]),
        (None, TypeError, ["None", "lite_compile.Spelling"]),
        (Sigmoid(name=""), ValueError, ["empty", "text"]),
        (Sigmoid(name=3), TypeError, ["3", "text"]),  # type: ignore[arg-type]
        (type("Nothing", (Spelling,), {"name": "nothing"})(), ValueError, ["Nothing", "pattern(node)"]),
    ],
)
def test_what_cannot_be_registered(spelling: Any, kind: type[Exception], parts: list[str]) -> None:
    with pytest.raises(kind) as caught:
        lite_compile.register_spelling(spelling)
    for part in parts:
        assert part in str(caught.value)
    assert registered_spellings() == ()


def test_names_are_unique() -> None:
    lite_compile.register_spelling(Sigmoid())
    with pytest.raises(ValueError, match=r"'sigmoid' is registered already.*unregister_spelling\('sigmoid'\)"):
        lite_compile.register_spelling(Sigmoid())


@pytest.mark.parametrize("spelling", ["softmax", Sigmoid(), None])
def test_unregistering_what_is_not_registered(spelling: Any) -> None:
    lite_compile.register_spelling(Sigmoid("another"))
    with pytest.raises(ValueError, match="not registered; allowed: 'another'"):
        lite_compile.unregister_spelling(spelling)
    lite_compile.unregister_spelling("another")
    with pytest.raises(ValueError, match="nothing, none is registered"):
        lite_compile.unregister_spelling("another")


def test_a_check_declines() -> None:
    lite_compile.register_spelling(Sigmoid(declined=Declined(Reason.VARIANT, "sigmoid")))
    gm = capture(Denoiser(sigmoid), *inputs())
    before = gm.code
    rewritten, _, report = rewrite_graph(gm, OPTIONS)
    assert [(site.reason, site.detail) for site in report.sites] == [(Reason.VARIANT, "sigmoid")]
    assert rewritten is gm
    assert gm.code == before


def test_a_result_of_another_shape_or_dtype_is_declined() -> None:
    class Wrong(Sigmoid):
        def __init__(self, call: tuple[Any, ...]) -> None:
            super().__init__()
            self.call = call

        def rewrite(self, site: AttentionSite, out: Any) -> Any:
            return plan(self.call[0], out, *self.call[1:])

    for call in (("transpose", 1, 2), ("to", torch.float64), ("flatten", 2)):
        spelling = lite_compile.register_spelling(Wrong(call))
        _, _, report = rewrite_graph(capture(Denoiser(sigmoid), *inputs()), OPTIONS)
        assert [site.reason for site in report.sites] == [Reason.LAYOUT]
        assert "instead of (1, 2, 64, 16) float32" in report.sites[0].detail
        lite_compile.unregister_spelling(spelling)


def test_errors_of_a_spelling_name_it_and_leave_the_model_usable() -> None:
    class Broken(Sigmoid):
        def pattern(self, node: fx.Node) -> Any:
            raise KeyError("nothing here")

    class Odd(Sigmoid):
        def pattern(self, node: fx.Node) -> Any:
            return node

    model = Denoiser().eval()
    for spelling, message in ((Broken("broken"), "'broken' failed at"), (Odd("odd"), "'odd' returned")):
        lite_compile.register_spelling(spelling)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="liteattention", options={"inner": "eager", "min_seq_len": 1})
        with torch.no_grad(), pytest.warns(UserWarning, match=message):
            torch.testing.assert_close(compiled(*inputs()), model(*inputs()))
        lite_compile.unregister_spelling(spelling)
