"""Threads that share compiled models. `test_threads.py` runs these in fresh processes.

Everything is compiled before the threads start: when several compile at the same time, torch 2.11 crashes (also with
`backend="eager"`) or no longer compiles, in that process, what follows a graph break.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from models import DEVICE, OPTIONS, compiled, denoise, noise, prompt, tiny_wan
from torch import Tensor


def run_threads(work: Callable[[int], None], count: int) -> None:
    """`work(number)` in as many threads at once."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def distance(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).norm() / y.norm()


@torch.no_grad()
def one_model() -> Tensor:
    """Relative distances from dense of 10 calls of one model in each of three threads."""
    run = compiled(tiny_wan())
    calls = [
        {
            "hidden_states": noise(seed),
            "timestep": torch.tensor([1000.0], device=DEVICE),
            "encoder_hidden_states": prompt(seed),
            "return_dict": False,
        }
        for seed in range(3)
    ]
    expected = [tiny_wan()(**call)[0] for call in calls]
    run(**calls[0])
    wrong: list[Tensor] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                wrong.append(distance(run(**calls[number])[0], expected[number]))

    run_threads(work, len(calls))
    return torch.stack(wrong)


def two_models() -> Tensor:
    """Whether the generations of two models in two threads equal, bit for bit, those of each alone."""
    runs = [compiled(tiny_wan(seed)) for seed in (0, 1)]
    expected = [denoise(runs[seed], noise(seed), [prompt(seed)], 4) for seed in (0, 1)]
    results: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        results[seed] = denoise(runs[seed], noise(seed), [prompt(seed)], 4)

    run_threads(work, 2)
    return torch.tensor([torch.equal(results[seed], expected[seed]) for seed in (0, 1)])


def one_model_compiled_by_blocks() -> Tensor:
    """Relative distances from dense of the generations of two prompts that two threads denoise with one model."""
    model = tiny_wan()
    model.compile_repeated_blocks(backend="liteattention", fullgraph=True, options=OPTIONS)
    denoise(model, noise(9), [prompt(0), prompt(1)], 2)
    exact = [denoise(tiny_wan(), noise(number), [prompt(number)], 4) for number in range(2)]
    results: dict[int, Tensor] = {}

    def work(number: int) -> None:
        results[number] = denoise(model, noise(number), [prompt(number)], 4)

    run_threads(work, 2)
    return torch.stack([distance(results[number], expected) for number, expected in enumerate(exact)])
