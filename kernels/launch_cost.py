"""How long a graph takes the host to launch and the GPU to compute: if the host is slower, skipping gains nothing."""

from __future__ import annotations

import torch

HOST_SECONDS = 100e-6
"""Of a compiled block with our op, per matrix product or attention and what surrounds it, on a slow host: 30 blocks of
Wan, 12 products each, took 60 us per product on a virtual machine with an H100 while it was quick, and 94 while it was
slow (benchmarks/LOG.md)."""
SMALL_HOST_SECONDS = 40e-6
"""Of a product that is small beside the others, such as a LoRA adapter's, around which there is nothing to launch: 0.3
to 0.6 of what another takes, measured with Inductor on a CPU (benchmarks/LOG.md)."""
FLOPS_PER_CLOCK = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192}
"""Of dense 16-bit products, per multiprocessor and by compute capability (NVIDIA's architecture white papers). An H20
computes less than its capability promises, so that what is dense on it may be longer than it should be."""
OTHER_FLOPS_PER_CLOCK = 512
"""Of GeForce cards, which sum 16-bit products in 32 bits at half their rate. Others have up to twice as many."""
REACHED = 0.5
"""Share of that which a block of 462 GFLOP reached on an H200, memory traffic between its products included: 0.86 ms
(25.7 ms for 30 blocks with Inductor and cuDNN, benchmarks/LOG.md)."""


def gpu_seconds(flops: float, device: torch.device) -> float:
    """About how long a CUDA device computes products of 16-bit elements of so many floating-point operations."""
    properties = torch.cuda.get_device_properties(device)
    per_clock = FLOPS_PER_CLOCK.get((properties.major, properties.minor), OTHER_FLOPS_PER_CLOCK)
    clocks_per_second = 1e3 * properties.clock_rate
    return flops / (REACHED * per_clock * properties.multi_processor_count * clocks_per_second)


def host_seconds(products: int, small: int = 0) -> float:
    """How long launching them takes the host, if it is a slow one; `small` of them are small beside the others."""
    return HOST_SECONDS * (products - small) + SMALL_HOST_SECONDS * small
