"""Tiny diffusers models with joint attention: the model, arguments, and where the text lies in each of its sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor, nn

from lite_compile import Reason

Text = dict[str, Reason | list[tuple[int, int]]]
Example = tuple[nn.Module, dict[str, Any], Text]
_SMALL = {"num_attention_heads": 2, "attention_head_dim": 16}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def flux(latents: int = 48, text: int = 16) -> Example:
    """Two projections, text first; then blocks of one stream."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), **_SMALL,
    )  # fmt: skip
    arguments = {
        "hidden_states": _random(2, latents, 4),
        "encoder_hidden_states": _random(2, text, 32),
        "pooled_projections": _random(2, 32),
        "timestep": torch.full((2,), 0.5),
        "img_ids": torch.arange(latents)[:, None].expand(latents, 3).float(),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }
    layers = ("transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1")
    return model.eval(), arguments, {f"{layer}.attn": [(0, text)] for layer in layers}


def hunyuan_video() -> Example:
    """Video first, text last, after the text went through blocks of its own."""
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=1,
        patch_size_t=1, guidance_embeds=False, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
        **_SMALL,
    )  # fmt: skip
    arguments = {
        "hidden_states": _random(1, 4, 2, 6, 6),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _random(1, 12, 16),
        "encoder_attention_mask": torch.ones(1, 12),
        "pooled_projections": _random(1, 8),
        "return_dict": False,
    }
    layers = ("transformer_blocks.0", "single_transformer_blocks.0")
    text: Text = {f"{layer}.attn": [(72, 84)] for layer in layers}
    return model.eval(), arguments, {"context_embedder.token_refiner.refiner_blocks.0.attn": Reason.TEXT, **text}


def cogvideox() -> Example:
    """Put together before the projections of each block, text first; rotary embeddings written in place."""
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16, num_layers=2, sample_width=8,
        sample_height=8, sample_frames=5, patch_size=2, max_text_seq_length=8, use_rotary_positional_embeddings=True,
        **_SMALL,
    )  # fmt: skip
    arguments = {
        "hidden_states": _random(1, 2, 4, 8, 8),
        "encoder_hidden_states": _random(1, 8, 16),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": (_random(32, 16), _random(32, 16)),
        "return_dict": False,
    }
    return model.eval(), arguments, {f"transformer_blocks.{block}.attn1": [(0, 8)] for block in range(2)}


def sd3() -> Example:
    """Image first, text last, and a second attention of the image alone."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, joint_attention_dim=32, caption_projection_dim=32,
        pooled_projection_dim=16, out_channels=4, pos_embed_max_size=16, dual_attention_layers=(0,),
        qk_norm="rms_norm", **_SMALL,
    )  # fmt: skip
    arguments = {
        "hidden_states": _random(2, 4, 16, 16),
        "encoder_hidden_states": _random(2, 10, 32),
        "pooled_projections": _random(2, 16),
        "timestep": torch.tensor([500, 500]),
        "return_dict": False,
    }
    text: Text = {f"transformer_blocks.{block}.attn": [(64, 74)] for block in range(2)}
    return model.eval(), arguments, {**text, "transformer_blocks.0.attn2": []}


def qwen_image() -> Example:
    """Two projections, text first, rotary embeddings of complex numbers before they are put together."""
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
        **_SMALL,
    )  # fmt: skip
    arguments = {
        "hidden_states": _random(1, 16, 16),
        "encoder_hidden_states": _random(1, 7, 32),
        "encoder_hidden_states_mask": None,
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
        "return_dict": False,
    }
    return model.eval(), arguments, {f"transformer_blocks.{block}.attn": [(0, 7)] for block in range(2)}


JOINT_MODELS: dict[str, Callable[[], Example]] = {
    "flux": flux,
    "hunyuan_video": hunyuan_video,
    "cogvideox": cogvideox,
    "sd3": sd3,
    "qwen_image": qwen_image,
}
