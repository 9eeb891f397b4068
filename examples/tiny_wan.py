"""A tiny Wan pipeline with random weights whose self-attention is peaked, as that of trained video models is.

Untrained attention is nearly uniform, so no tile of it is negligible. Here the biases of `to_q` and `to_k` are set so
that, after the rotary embedding, each head prefers keys at a small distance in time, in height, or in both: the local
patterns that trained video models show. The content of the tokens, which changes from step to step, adds to that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor, nn

HEAD_DIM = 64
TEXT_TOKENS, TEXT_DIM = 32, 64


@dataclass(frozen=True)
class Focus:
    """What one head looks at: weights of the rotary frequencies (in radians per token) along time and height."""

    time: float
    height: float


HEADS = (Focus(1.0, 0.0), Focus(0.0, 1.0), Focus(0.6, 0.4), Focus(0.3, 0.3))
WAVELENGTHS = (12.0, 40.0)
"""Preferred distances repeat after that many tokens; a short and a long one together have a single peak."""


def tiny_transformer(
    layers: int = 3, sharpness: float = 4.0, content: float = 1.0, settling: float = 0.8, seed: int = 0
) -> WanTransformer3DModel:
    """A `WanTransformer3DModel` with random weights and peaked self-attention.

    Args:
        layers: number of transformer blocks.
        sharpness: factor on the logits, the size of q and k being fixed by their RMS norms.
        content: size of what q and k say about the token, relative to what they say about its place.
        settling: share of `content` that is lost towards the last step, so that attention becomes more local.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=len(HEADS), attention_head_dim=HEAD_DIM, in_channels=16,
            out_channels=16, text_dim=TEXT_DIM, freq_dim=64, ffn_dim=2 * len(HEADS) * HEAD_DIM, num_layers=layers,
            rope_max_seq_len=64,
        )  # fmt: skip
        for block in model.blocks:
            sharpen_attention(block.attn1, sharpness, content)
            let_attention_count(block)
        nn.init.normal_(model.proj_out.weight, std=1 / math.sqrt(model.proj_out.in_features))
        settle_over_time(model, settling)
    return model.eval()


@torch.no_grad()
def sharpen_attention(attention: WanAttention, sharpness: float, content: float) -> None:
    """Make a Wan self-attention layer prefer near keys; `tiny_transformer` has the arguments."""
    place = torch.cat([place_vector(focus) for focus in HEADS])
    place = place / place.square().mean().sqrt()
    for linear, norm in ((attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k)):
        nn.init.normal_(linear.weight, std=content / math.sqrt(linear.in_features))
        linear.bias.copy_(place)
        norm.weight.fill_(math.sqrt(sharpness))


@torch.no_grad()
def let_attention_count(block: WanTransformerBlock) -> None:
    """Let self-attention weigh as much as the residual stream; with random weights it hardly matters."""
    for linear in (block.attn1.to_v, block.attn1.to_out[0]):
        nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
    block.scale_shift_table[:, 2] = 1.0  # the gate of self-attention


def place_vector(focus: Focus) -> Tensor:
    """`[HEAD_DIM]` vector u: after the rotary embedding, u.u depends on distance only and peaks at none."""
    side = 2 * (HEAD_DIM // 6)  # rotary channels for height, and for width; the rest is for time
    spans = {"time": (0, HEAD_DIM - 2 * side), "height": (HEAD_DIM - 2 * side, side)}
    vector = torch.zeros(HEAD_DIM)
    for axis, (start, size) in spans.items():
        frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)
        for wavelength in WAVELENGTHS:
            nearest = int((frequencies.log() - math.log(2 * math.pi / wavelength)).abs().argmin())
            vector[start + 2 * nearest] += math.sqrt(getattr(focus, axis))
    return vector


@torch.no_grad()
def settle_over_time(model: WanTransformer3DModel, settling: float) -> None:
    """Let the timestep scale the input of self-attention: by 1 at t = 1000, by `1 - settling` at t = 0."""
    embedder = model.condition_embedder
    first, second, last = embedder.time_embedder.linear_1, embedder.time_embedder.linear_2, embedder.time_proj
    for linear in (first, second, last):
        linear.weight.zero_()
        linear.bias.zero_()
    # cos(w t) with w = 10000 ** (-20 / 32), about pi / 1000, is the embedding's channel that falls all the way.
    channel = 20 * first.in_features // 64
    first.weight[0, channel], first.bias[0] = -0.5, 0.5
    second.weight[0, 0] = 1.0
    peak = nn.functional.silu(nn.functional.silu(torch.tensor(1.0)))  # of channel 0 as `time_proj` gets it
    scale = slice(second.out_features, 2 * second.out_features)
    last.weight[scale, 0], last.bias[scale] = settling / peak, -settling


def tiny_pipeline(layers: int = 3, flow_shift: float = 3.0) -> WanPipeline:
    """A `WanPipeline` around `tiny_transformer`; it has no text encoder and no VAE: give embeddings, take latents."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=flow_shift
    )
    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=tiny_transformer(layers)
    )


def random_prompt(seed: int) -> Tensor:
    """Stands for the text encoder's output: `[1, TEXT_TOKENS, TEXT_DIM]`."""
    return torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(seed))
