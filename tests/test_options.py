"""Every option's wrong values raise, and say what would have been right."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from lite_compile import Options, OptionTypeError, OptionValueError

WRONG: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"threshold": 1.0}, ValueError, ["threshold", "1.0", "<= 0", "log2"]),
    ({"threshold": float("nan")}, ValueError, ["threshold", "nan"]),
    ({"threshold": -(10**400)}, ValueError, ["threshold", "range of a float", "<= 0"]),
    ({"threshold": "-10"}, TypeError, ["threshold", "'-10'", "str"]),
    ({"threshold": True}, TypeError, ["threshold", "True"]),
    ({"threshold": None}, TypeError, ["threshold", "None", "lite_compile.Schedule", "'*'"]),
    ({"threshold": [-3]}, ValueError, ["threshold", "[-3]", "two or more"]),
    ({"threshold": [-3, 1]}, ValueError, ["threshold[1]", "is 1", "<= 0"]),
    ({"threshold": [-3, None]}, TypeError, ["threshold[1]", "None", "number"]),
    ({"threshold": {"blocks.*": -3}}, ValueError, ["threshold", "'blocks.*'", "under '*'"]),
    ({"threshold": {"*": -3, "": -4}}, TypeError, ["threshold", "layer-name globs"]),
    ({"threshold": {"*": -3, "a": 2}}, ValueError, ["threshold['a']", "is 2", "<= 0"]),
    ({"threshold": {"*": [-3, "x"]}}, TypeError, ["threshold['*'][1]", "'x'"]),
    ({"threshold": {"*": {"*": -3}}}, TypeError, ["threshold['*']", "lite_compile.Schedule"]),
    ({"dense_steps": 3}, TypeError, ["dense_steps", "3", "pair (first, last)"]),
    ({"dense_steps": (1, 2, 3)}, TypeError, ["dense_steps", "(1, 2, 3)"]),
    ({"dense_steps": (True, 0)}, TypeError, ["dense_steps", "True"]),
    ({"dense_steps": ("1", 0)}, TypeError, ["dense_steps", "'1'"]),
    ({"dense_steps": (-1, 0)}, ValueError, ["dense_steps", "-1", "integer from 0 to 2^30"]),
    ({"dense_steps": (0, 1.5)}, ValueError, ["dense_steps", "1.5", "float from 0 to 1"]),
    ({"dense_steps": (float("nan"), 0)}, ValueError, ["dense_steps", "nan"]),
    ({"dense_step": (1, 0)}, ValueError, ["dense_step", "Did you mean 'dense_steps'?"]),
    ({"refresh_every": 0}, ValueError, ["refresh_every", "0", "None, or an integer from 1"]),
    ({"refresh_every": True}, TypeError, ["refresh_every", "True"]),
    ({"refresh_every": 2.0}, TypeError, ["refresh_every", "2.0"]),
    ({"refresh_evry": 2}, ValueError, ["refresh_evry", "Did you mean 'refresh_every'?"]),
    ({"min_seq_len": 0}, ValueError, ["min_seq_len", "0", "integer from 1"]),
    ({"min_seq_len": 10.5}, TypeError, ["min_seq_len", "10.5"]),
    ({"qk_dtype": "int4"}, ValueError, ["qk_dtype", "'int4'", "'int8'", "'fp8'"]),
    ({"qk_dtype": 8}, TypeError, ["qk_dtype", "8"]),
    ({"criterion": "mas"}, ValueError, ["criterion", "'mas'", "'max'", "Did you mean 'mass'?"]),
    ({"criterion": None}, TypeError, ["criterion", "None", "'mass'"]),
    ({"min_seq_len": "aut"}, TypeError, ["min_seq_len", "'aut'", "'auto'", "Did you mean 'auto'?"]),
    ({"protect": "atuo"}, TypeError, ["protect", "'atuo'", "Did you mean 'auto'?"]),
    ({"KERNEL": "triton"}, ValueError, ["'KERNEL'", "Did you mean 'kernel'?"]),
    ({"qk_dtype": "fp9"}, ValueError, ["qk_dtype", "'fp9'", "None | 'int8' | 'fp8'", "Did you mean 'fp8'?"]),
    ({"must_compute": [(0, 10**30)]}, ValueError, ["must_compute", "each less than 2^31 - 1"]),
    ({"dense_steps": (2**31, 0)}, ValueError, ["dense_steps", "integer from 0 to 2^30"]),
    ({"threshold": "\0.toml"}, ValueError, ["threshold", "cannot be read"]),
    ({"max_streams": 0}, ValueError, ["max_streams", "0", "1 to 64"]),
    ({"max_streams": 65}, ValueError, ["max_streams", "65"]),
    ({"max_streams": None}, TypeError, ["max_streams", "None"]),
    ({"layers": "blocks.*"}, TypeError, ["layers", "'blocks.*'", "list"]),
    ({"layers": [1]}, TypeError, ["layers", "[1]"]),
    ({"exclude_layers": {"a": 1}}, TypeError, ["exclude_layers", "list"]),
    ({"exclude_layers": [""]}, TypeError, ["exclude_layers"]),
    ({"must_skip": (0, 512)}, TypeError, ["must_skip", "(0, 512)", "list of at most 16 pairs"]),
    ({"must_skip": "auto"}, TypeError, ["must_skip", "'auto'"]),
    ({"must_skip": [(0, 5.5)]}, TypeError, ["must_skip", "5.5"]),
    ({"must_compute": [(True, 5)]}, TypeError, ["must_compute", "True"]),
    ({"must_compute": [(7, 7)]}, ValueError, ["must_compute", "(7, 7)", "start < end"]),
    ({"must_compute": [(-1, -7)]}, ValueError, ["must_compute", "(-1, -7)"]),
    ({"must_compute": [(-5, 3)]}, ValueError, ["must_compute", "(-5, 3)", "none that counts"]),
    ({"must_compute": [(0, 2**31)]}, ValueError, ["must_compute", "2147483648"]),
    ({"must_skip": [(2 * i, 2 * i + 1) for i in range(17)]}, ValueError, ["must_skip", "at most 16"]),
    ({"must_skip": [(0, None)]}, ValueError, ["must_skip", "leaves no key"]),
    (
        {"must_skip": [(0, 9)], "must_compute": [(8, 12)]},
        ValueError,
        ["must_skip", "must_compute", "overlap", "(8, 12)"],
    ),
    ({"must_skp": [(0, 9)]}, ValueError, ["must_skp", "Did you mean 'must_skip'?"]),
    ({"dense_layers": "blocks.*"}, TypeError, ["dense_layers", "'blocks.*'", "list of layer-name globs"]),
    ({"dense_layers": ["a", 1]}, TypeError, ["dense_layers", "['a', 1]"]),
    ({"dense_layers": (1, 2, 3)}, TypeError, ["dense_layers", "pair (first, last)"]),
    ({"dense_layers": (1, True)}, TypeError, ["dense_layers", "True"]),
    ({"dense_layers": (1, -1)}, ValueError, ["dense_layers", "(1, -1)", ">= 0"]),
    ({"dense_layer": (1, 1)}, ValueError, ["dense_layer", "Did you mean 'dense_layers'?"]),
    ({"protect": "text"}, TypeError, ["protect", "'text'", "'auto'", "(start, end)"]),
    ({"protect": (0, 512)}, TypeError, ["protect", "(0, 512)", "list of at most 4 pairs"]),
    ({"protect": [(0, 512, 1)]}, TypeError, ["protect", "(0, 512, 1)"]),
    ({"protect": [(0, 51.2)]}, TypeError, ["protect", "51.2"]),
    ({"protect": [(False, 512)]}, TypeError, ["protect", "False"]),
    ({"protect": [(None, 512)]}, TypeError, ["protect", "None"]),
    ({"protect": [(512, 512)]}, ValueError, ["protect", "512", "start < end"]),
    ({"protect": [(-1, -256)]}, ValueError, ["protect", "-256", "start < end"]),
    ({"protect": [(-256, 0)]}, ValueError, ["protect", "-256", "(-256, None)"]),
    ({"protect": [(i, i + 1) for i in range(5)]}, ValueError, ["protect", "at most 4"]),
    ({"kernel": "hoper"}, ValueError, ["kernel", "'hoper'", "'triton'", "Did you mean 'hopper'?"]),
    ({"kernel": None}, TypeError, ["kernel", "None", "'auto'"]),
    ({"fuse_rotary": 1}, TypeError, ["fuse_rotary", "1", "True"]),
    ({"fuse_rotary": "cuda"}, TypeError, ["fuse_rotary", "'cuda'"]),
    ({"fuse_rotery": True}, ValueError, ["fuse_rotery", "Did you mean 'fuse_rotary'?"]),
    ({"fuse_layer_norm": 0}, TypeError, ["fuse_layer_norm", "0", "True"]),
    ({"fuse_layernorm": True}, ValueError, ["fuse_layernorm", "Did you mean 'fuse_layer_norm'?"]),
    ({"inner": "inductr"}, ValueError, ["inner", "'inductr'", "aot_eager", "Did you mean 'inductor'?"]),
    ({"inner": 1}, TypeError, ["inner", "1"]),
    ({"mode": "reduce_overhead"}, ValueError, ["mode", "Did you mean 'reduce-overhead'?"]),
    ({"mode": 3}, TypeError, ["mode", "3"]),
    ({"inductor": {"max_autotun": True}}, ValueError, ["inductor", "max_autotun", "Did you mean 'max_autotune'?"]),
    ({"inductor": [1]}, TypeError, ["inductor", "dict"]),
    ({"inner": "eager", "mode": "reduce-overhead"}, ValueError, ["mode", "eager"]),
    ({"inner": "eager", "inductor": {"max_autotune": True}}, ValueError, ["inductor", "eager"]),
    ({"on_unsupported": "raise"}, ValueError, ["on_unsupported", "'dense'", "'error'"]),
    ({"on_unsupported": None}, TypeError, ["on_unsupported"]),
    ({"treshold": -10}, ValueError, ["treshold", "-10", "max_streams", "Did you mean 'threshold'?"]),
    ({3: 4}, ValueError, ["3"]),
]


@pytest.mark.parametrize(("options", "kind", "parts"), WRONG, ids=[str(case[0]) for case in WRONG])
def test_wrong_options_raise_and_say_what_is_allowed(
    options: dict[str, Any], kind: type[Exception], parts: list[str]
) -> None:
    model = torch.nn.Linear(4, 4)
    with torch.no_grad(), pytest.raises(kind) as caught:
        torch.compile(model, backend="liteattention", options=options)(torch.ones(2, 4))
    assert isinstance(caught.value, OptionValueError | OptionTypeError)
    for part in parts:
        assert part in str(caught.value)


def test_wrong_mode_raises() -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="reduce-overhead"):
        torch.compile(torch.nn.Linear(4, 4), backend="liteattention", mode="reduce_overhead")(torch.ones(2, 4))


def test_a_wrong_option_leaves_the_model_usable() -> None:
    model = torch.nn.Linear(4, 4)
    x = torch.ones(2, 4)
    with torch.no_grad():
        with pytest.raises(ValueError, match="threshold"):
            torch.compile(model, backend="liteattention", options={"threshold": 1})(x)
        good = torch.compile(model, backend="liteattention", options={"threshold": -1, "inner": "eager"})
        assert torch.equal(good(x), model(x))


def test_every_option_is_documented_and_its_default_is_valid() -> None:
    Options()
    for entry in dataclasses.fields(Options):
        assert len(entry.metadata["doc"]) > 20


def test_good_values() -> None:
    options = Options(threshold=-math.inf, layers=["a.*"], exclude_layers=("b",), mode="max-autotune")
    assert options.threshold == -math.inf
    assert options.layers == ("a.*",)
    assert options.inductor_config()["max_autotune"] is True
    assert Options(threshold=0).threshold == 0.0
    assert Options(dense_steps=[2, 0.1]).dense_steps == (2, 0.1)
    assert Options().dense_steps == Options(dense_steps=(0, 0.0)).dense_steps == (0, 0)
    assert Options().protect == Options(protect="auto").protect == "auto"
    assert Options(protect=None).protect == Options(protect=[]).protect == ()
    assert Options(protect=[[-256, None], (0, -10)]).protect == ((-256, None), (0, -10))
    assert Options.parse({"threshold": -3}, mode="reduce-overhead").inductor_config()["triton.cudagraphs"] is True
    assert Options.parse({"inductor": {"max_autotune": True}}).inductor_config() == {"max_autotune": True}
