"""The option `kernel`, as far as a CPU shows it."""

from __future__ import annotations

import pytest
import torch
from models import OPTIONS, denoise, noise, prompt, tiny_wan

import lite_compile
from lite_compile import OptionValueError
from lite_compile.kernels.select_kernel import Kernel, cuda_kernel, select_kernel

CPU = torch.device("cpu")


@pytest.mark.parametrize("kernel", ["hopper", "triton"])
def test_a_kernel_that_cannot_be_used_is_an_error_that_names_the_layer(kernel: str) -> None:
    run = torch.compile(tiny_wan(), backend="liteattention", options={**OPTIONS, "kernel": kernel})
    with pytest.raises(
        OptionValueError, match=f"'kernel' is '{kernel}'.*blocks.0.attn1.*allowed on cpu: 'auto', 'cpu'"
    ):
        denoise(run, noise(0), [prompt(0)], 2)


def test_8_bits_where_no_kernel_has_them_are_an_error_that_names_the_layer() -> None:
    run = torch.compile(tiny_wan(), backend="liteattention", options={**OPTIONS, "qk_dtype": "int8"})
    with pytest.raises(
        OptionValueError, match=r"'qk_dtype' is 'int8'.*blocks.0.attn1.*8 bits need the kernel 'hopper'"
    ):
        denoise(run, noise(0), [prompt(0)], 2)


@pytest.mark.parametrize("kernel", ["auto", "cpu"])
def test_the_cpu_kernel_is_used(kernel: str) -> None:
    run = torch.compile(tiny_wan(), backend="liteattention", options={**OPTIONS, "kernel": kernel})
    lite_compile.clear_report()
    denoise(run, noise(0), [prompt(0)], 2)
    assert {site.kernel for site in lite_compile.report().rewritten} == {"cpu"}


def test_kernels_by_name() -> None:
    chosen = select_kernel(CPU, torch.float32, 64)
    assert isinstance(chosen, Kernel)
    assert chosen.name == "cpu"
    assert isinstance(select_kernel(CPU, torch.float32, 64, "triton"), str)
    assert cuda_kernel("triton").__name__ == "attend_triton"
    assert cuda_kernel("hopper").__name__ == "attend_hopper"
    assert cuda_kernel("hopper-fp8").keywords == {"qk_dtype": "fp8"}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="'cpu'; allowed on cuda: 'hopper', 'hopper-int8', 'hopper-fp8', 'triton'"):
        cuda_kernel("cpu")
