"""Call a pass that fuses nodes on what Dynamo makes of a function, and small models of diffusers to call it on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lite_compile.passes.graph_inputs import fake_mode

CPU = torch.device("cpu")


class Outcome(NamedTuple):
    fused: int
    is_unchanged: bool
    """Whether the graph's code is what it was."""
    guards: int
    """How many guards on shapes were added."""
    code: str
    result: Any


def run_pass(
    fuse: Callable[..., int], function: Callable[..., Any], *args: Any, dynamic: bool | None = None, grad: bool = False,
    **kwargs: Any,
) -> Outcome:  # fmt: skip
    """Compile `function` with the one pass `fuse` and call it."""
    seen: list[tuple[int, bool, int, str]] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        before, shapes = gm.code, fake_mode(gm).shape_env
        guards = len(shapes.guards) if shapes is not None else 0
        fused = fuse(gm, CPU, least_elements=0)
        gm.graph.lint()
        gm.recompile()
        added = (len(shapes.guards) if shapes is not None else 0) - guards
        seen.append((fused, gm.code == before, added, gm.code))
        return gm.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        result = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    ((fused, is_unchanged, guards, code),) = seen
    return Outcome(fused, is_unchanged, guards, code, result)


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tiny_wan() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, ffn_dim=64, num_layers=2, text_dim=16, freq_dim=16
    )
    prompt = noise(1, 1, 8, 16)
    return model, {"hidden_states": noise(0, 1, 16, 2, 8, 8), "encoder_hidden_states": prompt, "timestep": [5.0]}


def tiny_ltx() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=16,
    )  # fmt: skip
    given = {"hidden_states": noise(0, 1, 8, 16), "encoder_hidden_states": noise(1, 1, 4, 16), "timestep": [5.0]}
    return model, {**given, "encoder_attention_mask": torch.ones(1, 4), "num_frames": 2, "height": 2, "width": 2}


def tiny_flux(num_layers: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    """`num_layers` blocks of two streams, and two of one."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        num_layers=num_layers, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(8, 12, 12), in_channels=16,
    )  # fmt: skip
    given = {"hidden_states": noise(0, 1, 16, 16), "encoder_hidden_states": noise(1, 1, 4, 16), "timestep": [0.5]}
    ids = {"img_ids": noise(3, 16, 3), "txt_ids": torch.zeros(4, 3)}
    return model, {**given, **ids, "pooled_projections": noise(2, 1, 16)}
