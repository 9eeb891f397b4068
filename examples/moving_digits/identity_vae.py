"""A real `AutoencoderKLWan` that only rearranges pixels: its weights are set by hand, not trained.

`WanPipeline` needs a VAE, and these videos are small enough to be denoised as pixels. Each 2 x 2 block of pixels
becomes the 12 channels of one latent, frame by frame, by the patches of the Wan 2.2 VAE; the network in between passes
every channel on. Its heads normalise and apply SiLU, which is undone as follows: a value travels as the pair (x, -x),
because silu(x) - silu(-x) = x, next to one large constant, because of which the RMS norm hardly depends on x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResidualBlock
from torch import Tensor, nn

SPATIAL_FACTOR = 2
LATENT_CHANNELS = 3 * SPATIAL_FACTOR**2
WIDTH = 2 * LATENT_CHANNELS + 1
CONSTANT = 1000.0
"""Against at most sqrt(2 * 12) for all values together: the norm is off by 1.2e-5 at most."""
LOG_VARIANCE = -30.0
"""Sampling from the posterior adds nothing that float32 could show."""


@torch.no_grad()
def identity_vae(mean: Sequence[float], std: Sequence[float]) -> AutoencoderKLWan:
    """The VAE; `mean` and `std` (12 values each) are what pipelines normalise its latents by.

    `encode` takes `[B, 3, F, H, W]` in -1..1 with F - 1 a multiple of 4, to latents `[B, 12, F, H / 2, W / 2]`.
    """
    vae = AutoencoderKLWan(
        base_dim=WIDTH, z_dim=LATENT_CHANNELS, dim_mult=[1], num_res_blocks=1, temperal_downsample=[],
        latents_mean=list(mean), latents_std=list(std), in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        patch_size=SPATIAL_FACTOR, scale_factor_temporal=1, scale_factor_spatial=SPATIAL_FACTOR,
    )  # fmt: skip
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            _clear(module.conv2)
        elif isinstance(module, WanAttentionBlock):
            _clear(module.proj)
    identity = torch.eye(LATENT_CHANNELS)
    split = torch.cat([identity, -identity, torch.zeros(1, LATENT_CHANNELS)])
    join = torch.cat([identity, -identity, torch.zeros(LATENT_CHANNELS, 1)], 1)
    for half in (vae.encoder, vae.decoder):
        _set_matrix(half.conv_in, split)
        _set_matrix(half.conv_out, join if half is vae.decoder else torch.cat([join, torch.zeros_like(join)]))
        half.mid_block.resnets[-1].conv2.bias[-1] = CONSTANT
        half.norm_out.gamma.fill_(CONSTANT / WIDTH**0.5)
    _set_matrix(vae.quant_conv, torch.eye(2 * LATENT_CHANNELS))
    vae.quant_conv.bias[LATENT_CHANNELS:] = LOG_VARIANCE
    _set_matrix(vae.post_quant_conv, identity)
    return vae.eval()


def fold(videos: Tensor) -> Tensor:
    """What `encode` makes of videos `[B, 3, F, H, W]`, without the network: `[B, 12, F, H / 2, W / 2]`."""
    latents = F.pixel_unshuffle(videos.transpose(1, 2), SPATIAL_FACTOR)
    return _swap_offsets(latents).transpose(1, 2)


def unfold(latents: Tensor) -> Tensor:
    """Inverse of `fold`."""
    return F.pixel_shuffle(_swap_offsets(latents.transpose(1, 2)), SPATIAL_FACTOR).transpose(1, 2)


def _swap_offsets(x: Tensor) -> Tensor:
    """Channels of `[..., 12, H, W]` from (colour, y, x) to (colour, x, y), the order of the VAE, or back."""
    blocks: Tensor = x.unflatten(-3, (3, SPATIAL_FACTOR, SPATIAL_FACTOR))
    return blocks.transpose(-3, -4).flatten(-5, -3)


def _clear(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.zero_()


def _set_matrix(layer: nn.Conv3d, matrix: Tensor) -> None:
    """Make a causal convolution apply `matrix` to each place, from the last tap in time and the middle one in space."""
    _clear(layer)
    assert layer.bias is not None
    _, height, width = layer.kernel_size
    layer.weight[:, :, -1, height // 2, width // 2] = matrix
