"""`attend_triton` with TMA descriptors in Triton's interpreter, against `attend_reference` in float64.

Run by `test_interpreter.py`, as `attend_cases.py` is. What is tested is what descriptors are made of, where their
blocks start and what lies outside; the interpreter has no copy engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import attend_cases
import mass_cases
import pytest
import torch
from attend_cases import Pair, make_now, make_qkv, run
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lite_compile.kernels import attend_triton, tma_blocks
from lite_compile.skip_state import TileShape

MADE: list[TensorDescriptor] = []


@pytest.fixture(scope="module", autouse=True)
def _by_tma() -> Iterator[None]:
    """The launch configuration of a Hopper GPU; the interpreter needs tensors where a GPU has addresses."""

    def describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
        assert tma_blocks.is_addressable(x)
        MADE.append(dataclasses.replace(tma_blocks.triton_descriptor(x, rows, columns), base=x))
        return MADE[-1]

    with pytest.MonkeyPatch.context() as patch:
        config = attend_triton._launch_config((9, 0), torch.float16, 64)
        patch.setattr(attend_triton, "_device_config", lambda *_: config)
        patch.setattr(attend_triton, "triton_descriptor", describe)
        yield


test_any_shape_dtype_stride_and_scale = attend_cases.test_any_shape_dtype_stride_and_scale
test_key_bias_follows_the_reference = attend_cases.test_key_bias_follows_the_reference
test_kinds_of_key_tiles_follow_the_reference = attend_cases.test_kinds_of_key_tiles_follow_the_reference
test_last_stride_may_be_any = attend_cases.test_last_stride_may_be_any
test_matches_reference_at_each_length = attend_cases.test_matches_reference_at_each_length
test_protected_tiles_are_never_marked = attend_cases.test_protected_tiles_are_never_marked
test_mass_states_follow_the_reference = mass_cases.test_states_follow_the_reference


@pytest.mark.parametrize("dim", [16, 40, 64, 72, 96, 128])
def test_blocks_are_of_the_tile_and_of_all_columns(dim: int) -> None:
    MADE.clear()
    q, k, v = make_qkv(2, 4, 70, 130, dim, torch.float16)
    pair = Pair(q, k[:, :2], v[:, :2])
    run(pair, [make_now()] * 3)
    assert pair.marks().any()
    columns = {16: 16, 40: 64, 64: 64}.get(dim, 128)
    assert [x.block_shape for x in MADE[:3]] == [[1, 1, rows, columns] for rows in (32, 16, 16)]
    assert [x.base.data_ptr() for x in MADE] == [x.data_ptr() for x in (q, k, v)] * 3


def misaligned(x: Tensor) -> Tensor:
    """The same 2 bytes past a multiple of 16 bytes."""
    memory = x.new_empty(x.numel() + 1)[1:].view(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
    return memory.copy_(x)


def between_others(x: Tensor) -> Tensor:
    """The same in rows of which each starts 2 bytes past a multiple of 16, or before."""
    return torch.nn.functional.pad(x, (0, 1))[..., :-1]


def repeated(x: Tensor) -> Tensor:
    """As many heads, all of them the first, at a stride of 0."""
    return x[:, :1].expand(x.shape)


@pytest.mark.parametrize("change", [misaligned, between_others, repeated])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_tma_cannot_address_is_copied(change: Callable[[Tensor], Tensor], which: int) -> None:
    tensors = list(make_qkv(1, 2, 70, 130, 40, torch.float16))
    tensors[which] = change(tensors[which])
    assert not tma_blocks.is_addressable(tensors[which])
    MADE.clear()
    run(Pair(*tensors, tile=TileShape(32, 32)), [make_now()] * 2)
    for i, x in enumerate(tensors):
        assert (MADE[i].base is x) == (i != which)
