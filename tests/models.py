"""Small models and denoising loops that the tests share. Importing runs nothing: fresh processes preload it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

DEVICE = torch.device(os.environ.get("LITE_TEST_DEVICE", "cpu"))
DTYPE: torch.dtype = getattr(torch, os.environ.get("LITE_TEST_DTYPE", "float32"))
"""What the models run on; `make test-gpu` runs the same tests on CUDA in 16 bits."""
TOLERANCE = 1e-3 if torch.float32 == DTYPE else 5e-2
"""Relative distance of two correct results of a few denoising steps, whose rounding errors guidance amplifies."""

LATENTS = (1, 4, 4, 32, 32)
"""Latents of the tiny Wan: 4 frames of 16x16 patches, 1,024 tokens."""
PROMPT_TOKENS, PROMPT_DIM = 8, 16
OPTIONS: dict[str, Any] = {"inner": "eager", "min_seq_len": 64, "threshold": -6.0}
"""Options under which the tiny models skip; eager, since most tests are not about code generation."""


def tiny_wan(seed: int = 0, layers: int = 2, heads: int = 2, head_dim: int = 32) -> WanTransformer3DModel:
    """A random Wan transformer whose self-attention is made local, so that tiles become negligible.

    Queries and keys get a common offset: under rotary embeddings it makes the score fall with the distance.
    """
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        text_dim=PROMPT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    ).eval()
    with torch.no_grad():
        for block in model.blocks:
            offset = torch.randn_like(block.attn1.to_q.bias) * 2
            block.attn1.to_q.bias.copy_(offset)
            block.attn1.to_k.bias.copy_(offset)
            block.attn1.norm_q.weight.fill_(4.0)
            block.attn1.norm_k.weight.fill_(4.0)
            block.attn2.to_out[0].weight.mul_(10)  # what the prompt says reaches the next block's attention
    return model.to(DEVICE, DTYPE)


def noise(seed: int, shape: Sequence[int] = LATENTS) -> Tensor:
    """Latents to start from."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def prompt(seed: int, batch: int = 1) -> Tensor:
    """Prompt embeddings `[batch, PROMPT_TOKENS, PROMPT_DIM]`."""
    shape = (batch, PROMPT_TOKENS, PROMPT_DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed)).to(DEVICE, DTYPE)


def compiled(model: torch.nn.Module, **options: Any) -> Callable[..., Any]:
    """`model` compiled with our backend under the tests' options."""
    return torch.compile(model, backend="liteattention", fullgraph=True, options={**OPTIONS, **options})


def timesteps(steps: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """Descending timesteps, one-element tensors, from 1000."""
    for step in range(steps):
        yield torch.tensor([1000.0 * (1 - step / steps)], device=DEVICE).to(dtype)


@torch.no_grad()
def denoise(
    model: Callable[..., Any],
    latents: Tensor,
    prompts: Sequence[Tensor],
    steps: int,
    *,
    dtype: torch.dtype = torch.float32,
    expand_timestep: Callable[[Tensor], Tensor] = lambda t: t,
    stop_after: int | None = None,
) -> Tensor:
    """A plain Euler sampler with sequential guidance: one model call per prompt and step."""
    sigmas = [1 - step / steps for step in range(steps + 1)]
    for step, t in enumerate(timesteps(steps, dtype)):
        if step == stop_after:
            break
        velocities = [
            model(hidden_states=latents, timestep=expand_timestep(t), encoder_hidden_states=p, return_dict=False)[0]
            for p in prompts
        ]
        velocity = velocities[-1] + 3.0 * (velocities[0] - velocities[-1])
        latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
    return latents


def tiny_pipeline(transformer: Any, scheduler: Any = None) -> WanPipeline:
    """A real `WanPipeline` around `transformer`; prompts are given as embeddings, results are latents."""
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_pipeline(
    pipeline: WanPipeline, seed: int, steps: int, prompts: tuple[int, int] = (0, 1), **kwargs: Any
) -> Tensor:
    """One generation with classifier-free guidance, as latents."""
    result: Tensor = pipeline(
        prompt_embeds=prompt(prompts[0]),
        negative_prompt_embeds=prompt(prompts[1]),
        height=kwargs.pop("height", 256),
        width=256,
        num_frames=13,
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **kwargs,
    ).frames
    return result
