"""The zoo: tiny models of diffusers' transformer classes and of `examples/dits`, with what is expected of each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import (
    get_1d_rotary_pos_embed,
    get_2d_rotary_pos_embed,
    get_2d_rotary_pos_embed_lumina,
    get_3d_rotary_pos_embed,
    get_3d_rotary_pos_embed_allegro,
)
from torch import Tensor
from zoo_model import Arguments, Prompt, ZooModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from dits.dit import DiT
from dits.video_dit import VideoDiT

from lite_compile import Reason

CROSS, MASK, SHORT, TEXT = Reason.CROSS_ATTENTION, Reason.MASK, Reason.SHORT, Reason.TEXT
VIDEO = (1, 4, 4, 16, 16)
"""4 frames of 8x8 patches: 256 tokens."""
IMAGE = (1, 4, 32, 32)
TOKENS = (1, 256, 8)
ZOO: dict[str, ZooModel] = {}


def add_class(
    class_name: str,
    config: dict[str, Any],
    arguments: Arguments,
    latents: tuple[int, ...],
    rewritten: int,
    dense: dict[Reason, int] | None = None,
    variant: str = "",
    **facts: Any,
) -> None:
    """Add a class of diffusers to the zoo."""

    def build() -> torch.nn.Module:
        model: torch.nn.Module = getattr(diffusers, class_name)(**config)
        return model

    add(ZooModel(class_name, variant, build, arguments, latents, rewritten, dense or {}, **facts))


def add(model: ZooModel) -> None:
    ZOO[model.name] = model


def text_only(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    return {"hidden_states": x, "timestep": t, "encoder_hidden_states": prompt(1, 8, 16)}


def masked_text(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    """Two tokens of the prompt are padding."""
    return {**text_only(x, t, prompt), "encoder_attention_mask": padding()}


def padding() -> Tensor:
    return torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])


# Wan and its kin: self-attention over the video, cross-attention to the text.
WAN = {
    "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 32, "ffn_dim": 64, "num_layers": 2, "rope_max_seq_len": 64,
}  # fmt: skip


def per_token_time(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    """Wan2.2 5B, image to video: a timestep per token, zero for the given first frame."""
    times = t.expand(1, 256).clone()
    times[:, :64] = 0
    return {**text_only(x, t, prompt), "timestep": times}


def with_image(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    """Wan 2.1, image to video: conditioning latents beside the noise, image embeddings beside the text."""
    condition = torch.ones_like(x)
    return {
        **text_only(torch.cat([x, condition], 1), t, prompt),
        "encoder_hidden_states_image": Prompt(prompt.seed + 500)(1, 8, 16),
    }


def with_given_frame(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    """Wan 2.2 A14B, image to video: conditioning latents beside the noise, no image embeddings."""
    return text_only(torch.cat([x, torch.ones_like(x)], 1), t, prompt)


def with_control(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    return {**text_only(x, t, prompt), "control_hidden_states": torch.ones(1, 6, 4, 16, 16)}


add_class("WanTransformer3DModel", WAN, text_only, VIDEO, 2, {CROSS: 2}, variant="Wan 2.1")
add_class(
    "WanTransformer3DModel",
    {**WAN, "in_channels": 8, "image_dim": 16, "added_kv_proj_dim": 64},
    with_image, VIDEO, 2, {CROSS: 4}, variant="Wan 2.1, image to video",
)  # fmt: skip
add_class("WanTransformer3DModel", WAN, per_token_time, VIDEO, 2, {CROSS: 2}, variant="Wan 2.2 5B")
add_class(
    "WanTransformer3DModel",
    {**WAN, "in_channels": 8},
    with_given_frame, VIDEO, 2, {CROSS: 2}, variant="Wan 2.2 A14B, image to video",
)  # fmt: skip
add_class(
    "WanVACETransformer3DModel", {**WAN, "vace_layers": [0], "vace_in_channels": 6}, with_control, VIDEO, 3, {CROSS: 3}
)
add_class("SkyReelsV2Transformer3DModel", WAN, text_only, VIDEO, 2, {CROSS: 2})
add_class("ChronoEditTransformer3DModel", WAN, text_only, VIDEO, 2, {CROSS: 2})


# HunyuanVideo: double-stream and single-stream blocks over video and text, a text refiner with a padding mask.
HUNYUAN = {
    "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1, "num_refiner_layers": 1,
    "rope_axes_dim": (8, 12, 12), "text_embed_dim": 16,
}  # fmt: skip


def hunyuan(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    return {
        **masked_text(x, t, prompt),
        "pooled_projections": prompt(1, 8),
        "guidance": torch.tensor([6000.0]),
    }


def framepack(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    history = {"clean": 2, "history_2x": 2, "history_4x": 4}
    arguments = hunyuan(x, t, prompt)
    start = 0
    for name, frames in history.items():
        arguments[f"latents_{name}"] = torch.ones(1, 4, frames, 16, 16)
        arguments[f"indices_latents_{name}"] = torch.arange(start, start + frames)
        start += frames
    return {
        **arguments,
        "indices_latents": torch.arange(start, start + x.shape[2]),
        "image_embeds": torch.ones(1, 8, 16),
    }


def hunyuan_15(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    """Text to video: no image, and a mask over the latents of given frames beside the noise."""
    condition = torch.zeros(1, 5, *x.shape[2:])
    return {
        **masked_text(torch.cat([x, condition], 1), t, prompt),
        "encoder_hidden_states_2": prompt(1, 4, 16),
        "encoder_attention_mask_2": torch.ones(1, 4),
        "image_embeds": torch.zeros(1, 4, 16),
    }


add_class(
    "HunyuanVideoTransformer3DModel",
    {
        **HUNYUAN, "in_channels": 4, "out_channels": 4, "num_single_layers": 1, "pooled_projection_dim": 8,
    },
    hunyuan, VIDEO, 2, {TEXT: 1},
)  # fmt: skip
add_class(
    "HunyuanVideoFramepackTransformer3DModel",
    {
        **HUNYUAN, "in_channels": 4, "out_channels": 4, "num_single_layers": 1, "pooled_projection_dim": 8,
        "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True,
    },
    framepack, VIDEO, 2, {TEXT: 1}, graphs=4,
    note="the number of valid text tokens is a tensor, which breaks the graph",
)  # fmt: skip
add_class(
    "HunyuanVideo15Transformer3DModel",
    {
        **HUNYUAN, "in_channels": 9, "out_channels": 4, "patch_size": 2, "text_embed_2_dim": 16,
        "image_embed_dim": 16, "num_layers": 2,
    },
    hunyuan_15, VIDEO, 0, {TEXT: 1, MASK: 1}, graphs=3, note="all blocks share one graph",
)  # fmt: skip
add_class(
    "HunyuanImageTransformer2DModel",
    {
        **HUNYUAN, "in_channels": 4, "out_channels": 4, "num_single_layers": 1, "patch_size": (2, 2),
        "rope_axes_dim": (16, 16),
    },
    masked_text, IMAGE, 2, {TEXT: 1},
)  # fmt: skip


# LTX: latents as tokens.
def ltx(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    return {**masked_text(x, t, prompt), "num_frames": 4, "height": 8, "width": 8}


def ltx2(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    """Video and audio together; the audio latents are derived from the video's, so that one loop serves."""
    return {
        **ltx(x, t, prompt),
        "audio_hidden_states": x[:, :64],
        "audio_encoder_hidden_states": prompt(1, 8, 16),
        "audio_encoder_attention_mask": padding(),
        "audio_num_frames": 64,
    }


add_class(
    "LTXVideoTransformer3DModel",
    {
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 32,
        "cross_attention_dim": 64, "num_layers": 2, "caption_channels": 16,
    },
    ltx, TOKENS, 2, {CROSS: 2}, skips=False,
)  # fmt: skip
add_class(
    "LTX2VideoTransformer3DModel",
    {
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 32,
        "cross_attention_dim": 64, "audio_in_channels": 8, "audio_out_channels": 8,
        "audio_num_attention_heads": 2, "audio_attention_head_dim": 16, "audio_cross_attention_dim": 32,
        "num_layers": 1, "caption_channels": 16,
    },
    ltx2, TOKENS, 2, {CROSS: 4}, note="video and sound attend to themselves and to each other",
)  # fmt: skip


# CogVideoX and CogView: text and image are concatenated before the projections.
def cogvideox(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    rotary = get_3d_rotary_pos_embed(32, ((0, 0), (8, 8)), (8, 8), 4)
    return {**text_only(x, t, prompt), "image_rotary_emb": rotary}


def cogview(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    size = torch.tensor([[256.0, 256.0]])
    return {
        **text_only(x, t, prompt),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(1, 2),
    }


COGVIEW = {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32,
    "text_embed_dim": 16, "time_embed_dim": 32, "condition_dim": 8,
}  # fmt: skip

add_class(
    "CogVideoXTransformer3DModel",
    {
        "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4,
        "time_embed_dim": 32, "text_embed_dim": 16, "num_layers": 2, "sample_width": 16, "sample_height": 16,
        "sample_frames": 13, "max_text_seq_length": 8, "use_rotary_positional_embeddings": True,
    },
    cogvideox, (1, 4, 4, 16, 16), 2,
)  # fmt: skip
add_class("CogView3PlusTransformer2DModel", {**COGVIEW, "pos_embed_max_size": 32}, cogview, IMAGE, 2)
add_class("CogView4Transformer2DModel", {**COGVIEW, "rope_axes_dim": (16, 16)}, cogview, IMAGE, 2)


# Other video models.
def allegro(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    frequencies = get_3d_rotary_pos_embed_allegro(48, ((0, 0), (8, 8)), (8, 8), 4, (1.0, 1.0, 1.0))
    grid = torch.cartesian_prod(*(axis.long() for axis in frequencies[3:]))
    return {**masked_text(x, t, prompt), "image_rotary_emb": (frequencies[:3], tuple(grid[None].unbind(-1)))}


def cosmos(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    return {**text_only(x, t / 1000, prompt), "fps": 16}


def kandinsky(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    return {
        **text_only(x, t, prompt),
        "pooled_projections": prompt(1, 8),
        "visual_rope_pos": [torch.arange(4), torch.arange(8), torch.arange(8)],
        "text_rope_pos": torch.arange(8),
    }


add_class(
    "MochiTransformer3DModel",
    {
        "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "pooled_projection_dim": 32,
        "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 16, "max_sequence_length": 8,
    },
    lambda x, t, prompt: {**masked_text(x, t, prompt), "encoder_attention_mask": padding().bool()}, VIDEO, 0,
    {CROSS: 1}, graphs=11, note="attention of the blocks is in no graph: `nonzero` picks the valid text tokens",
)  # fmt: skip
add_class(
    "AllegroTransformer3DModel",
    {
        "num_attention_heads": 2, "attention_head_dim": 48, "in_channels": 4, "out_channels": 4,
        "num_layers": 2, "cross_attention_dim": 96, "sample_width": 16, "sample_height": 16, "sample_frames": 4,
        "caption_channels": 16,
    },
    allegro, VIDEO, 2, {CROSS: 2},
)  # fmt: skip
add_class(
    "LatteTransformer3DModel",
    {
        "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 8,
        "num_layers": 1, "cross_attention_dim": 64, "attention_bias": True, "sample_size": 32, "patch_size": 2,
        "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False, "caption_channels": 16, "video_length": 4,
    },
    text_only, (1, 4, 4, 32, 32), 1, {CROSS: 1, SHORT: 1}, note="attention over time has 4 tokens",
)  # fmt: skip
add_class(
    "EasyAnimateTransformer3DModel",
    {
        "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4,
        "patch_size": 2, "sample_width": 16, "sample_height": 16, "num_layers": 2, "mmdit_layers": 2,
        "time_embed_dim": 32, "text_embed_dim": 16,
    },
    text_only, VIDEO, 2,
)  # fmt: skip
add_class(  # padding masks are resized by torchvision
    "CosmosTransformer3DModel",
    {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 32,
        "num_layers": 2, "text_embed_dim": 16, "adaln_lora_dim": 8, "max_size": (8, 16, 16),
        "concat_padding_mask": False,
    },
    cosmos, VIDEO, 2, {CROSS: 2}, skips=False,
)  # fmt: skip
add_class(
    "Kandinsky5Transformer3DModel",
    {
        "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 32,
        "model_dim": 64, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (8, 12, 12),
    },
    kandinsky, (1, 4, 16, 16, 4), 2, {TEXT: 1, CROSS: 2},
)  # fmt: skip
add_class(
    "SanaVideoTransformer3DModel",
    {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 32,
        "num_layers": 1, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32,
        "cross_attention_dim": 64, "caption_channels": 16, "sample_size": 16,
    },
    masked_text, VIDEO, 0, {CROSS: 1}, note="self-attention is linear, there is no softmax",
)  # fmt: skip


# Joint attention over text and image.
def flux(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    return {
        **text_only(x, t / 1000, prompt),
        "pooled_projections": prompt(1, 8),
        "img_ids": grid_ids(3),
        "txt_ids": torch.zeros(8, 3),
    }


def guided_flux(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    return {**flux(x, t, prompt), "guidance": torch.tensor([3.5])}


def flux2(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    return {
        **text_only(x, t / 1000, prompt),
        "img_ids": grid_ids(4),
        "txt_ids": torch.zeros(8, 4),
        "guidance": torch.tensor([3.5]),
    }


def grid_ids(axes: int) -> Tensor:
    """Position ids of 16x16 patches, the last two axes being row and column."""
    ids = torch.zeros(16, 16, axes)
    ids[..., -2] = torch.arange(16)[:, None]
    ids[..., -1] = torch.arange(16)
    return ids.flatten(0, 1)


def chroma(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    mask = torch.cat([padding().bool(), torch.ones(1, 256, dtype=torch.bool)], 1)
    return {
        **text_only(x, t / 1000, prompt),
        "img_ids": grid_ids(3),
        "txt_ids": torch.zeros(8, 3),
        "attention_mask": mask,
    }


def qwen_image(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    return {
        **text_only(x, t / 1000, prompt),
        "encoder_hidden_states_mask": padding().bool(),
        "img_shapes": [[(1, 16, 16)]],
    }


FLUX = {
    "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32,
    "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (8, 12, 12),
}  # fmt: skip

add_class("FluxTransformer2DModel", {**FLUX, "pooled_projection_dim": 8}, flux, TOKENS, 2, variant="schnell")
add_class(
    "FluxTransformer2DModel",
    {
        **FLUX, "pooled_projection_dim": 8, "guidance_embeds": True,
    },
    guided_flux, TOKENS, 2, variant="dev",
)  # fmt: skip
add_class("Flux2Transformer2DModel", {**FLUX, "axes_dims_rope": (8, 8, 8, 8)}, flux2, TOKENS, 2)
add_class(
    "ChromaTransformer2DModel",
    {
        **FLUX, "approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1,
    },
    chroma, TOKENS, 0, {MASK: 2},
)  # fmt: skip
add_class(
    "BriaTransformer2DModel",
    FLUX,
    lambda x, t, prompt: {k: v for k, v in flux(x, t, prompt).items() if k != "pooled_projections"}, TOKENS, 2,
)  # fmt: skip
add_class(
    "SD3Transformer2DModel",
    {
        "sample_size": 32, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 32,
        "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 64,
        "pooled_projection_dim": 8, "pos_embed_max_size": 32, "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    lambda x, t, prompt: {**text_only(x, t, prompt), "pooled_projections": prompt(1, 8)}, IMAGE, 3,
)  # fmt: skip
add_class(
    "QwenImageTransformer2DModel",
    {
        "in_channels": 8, "out_channels": 2, "num_layers": 2, "attention_head_dim": 32,
        "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (8, 12, 12),
    },
    qwen_image, TOKENS, 2,
)  # fmt: skip
add_class(
    "AuraFlowTransformer2DModel",
    {
        "sample_size": 32, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 32,
        "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 64,
        "pos_embed_max_size": 256,
    },
    lambda x, t, prompt: text_only(x, t / 1000, prompt), IMAGE, 2, skips=False,
)  # fmt: skip


# Other image models, and one for sound.
def hunyuan_dit(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    return {
        **text_only(x, t, prompt),
        "text_embedding_mask": padding(),
        "encoder_hidden_states_t5": prompt(1, 8, 16),
        "text_embedding_mask_t5": padding(),
        "image_meta_size": torch.tensor([[256, 256, 256, 256, 0, 0]]),
        "style": torch.tensor([0]),
        "image_rotary_emb": get_2d_rotary_pos_embed(32, ((0, 0), (16, 16)), (16, 16), output_type="pt"),
    }


def lumina_next(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    return {
        **text_only(x, 1 - t / 1000, prompt),
        "encoder_mask": padding(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(32, 384, 384),
        "cross_attention_kwargs": {},
    }


def z_image(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    """Images and prompts as lists; the time runs from 0 to 1."""
    return {"x": [x[0]], "t": 1 - t / 1000, "cap_feats": [prompt(8, 16)]}


def stable_audio(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    return {
        **text_only(x, t / 1000, prompt),
        "global_hidden_states": prompt(1, 1, 16),
        "rotary_embedding": get_1d_rotary_pos_embed(16, 257, use_real=True, repeat_interleave_real=False),
    }


add_class(
    "PixArtTransformer2DModel",
    {
        "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 8,
        "num_layers": 2, "cross_attention_dim": 64, "sample_size": 32, "caption_channels": 16,
        "use_additional_conditions": False,
    },
    lambda x, t, prompt: {**masked_text(x, t, prompt), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    IMAGE, 2, {CROSS: 2},
)  # fmt: skip
add_class(
    "SanaTransformer2DModel",
    {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 32,
        "num_layers": 1, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32,
        "cross_attention_dim": 64, "caption_channels": 16,
    },
    masked_text, (1, 4, 16, 16), 0, {CROSS: 1}, note="self-attention is linear, there is no softmax",
)  # fmt: skip
add_class(
    "HunyuanDiT2DModel",
    {
        "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "patch_size": 2,
        "sample_size": 32, "hidden_size": 64, "num_layers": 2, "cross_attention_dim": 16,
        "cross_attention_dim_t5": 16, "pooled_projection_dim": 16, "text_len": 8, "text_len_t5": 8,
    },
    hunyuan_dit, IMAGE, 2, {CROSS: 3}, note="one of the cross-attentions pools the text",
)  # fmt: skip
add_class(
    "DiTTransformer2DModel",
    {
        "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 8,
        "num_layers": 2, "sample_size": 32, "num_embeds_ada_norm": 10,
    },
    lambda x, t, prompt: {"hidden_states": x, "timestep": t, "class_labels": torch.tensor([prompt.seed % 10])},
    IMAGE, 2,
)  # fmt: skip
add_class(
    "Lumina2Transformer2DModel",
    {
        "sample_size": 32, "in_channels": 4, "hidden_size": 64, "num_layers": 2, "num_refiner_layers": 1,
        "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (8, 12, 12),
        "axes_lens": (32, 32, 32), "cap_feat_dim": 16,
    },
    lambda x, t, prompt: masked_text(x, 1 - t / 1000, prompt), IMAGE, 3, {TEXT: 1}, graphs=4,
    note="the rotary embedding breaks the graph; time rises",
)  # fmt: skip
add_class(
    "LuminaNextDiT2DModel",
    {
        "sample_size": 32, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 2, "num_kv_heads": 2,
        "multiple_of": 16, "ffn_dim_multiplier": 1.0, "cross_attention_dim": 16,
    },
    lumina_next, IMAGE, 2, {CROSS: 2}, note="time rises",
)  # fmt: skip
add_class(
    "ZImageTransformer2DModel",
    {
        "in_channels": 4, "dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 16, "axes_dims": [8, 12, 12], "axes_lens": [64, 32, 32],
    },
    z_image, (1, 4, 1, 32, 32), 2, {TEXT: 1}, graphs=5, skips=False,
    note="the first call makes the rotary tables, which breaks the graph; time rises",
)  # fmt: skip
add_class(
    "StableAudioDiTModel",
    {
        "sample_size": 256, "in_channels": 8, "out_channels": 8, "num_layers": 1, "attention_head_dim": 32,
        "num_attention_heads": 2, "num_key_value_attention_heads": 1, "cross_attention_dim": 32,
        "time_proj_dim": 32, "global_states_input_dim": 16, "cross_attention_input_dim": 16,
    },
    stable_audio, (1, 8, 256), 1, {CROSS: 1},
)  # fmt: skip


# Written from their papers: `examples/dits`.
def labelled(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    return {"x": x, "t": t, "y": torch.tensor([prompt.seed % 10])}


def video_dit(x: Tensor, t: Tensor, prompt: Prompt) -> dict[str, Any]:
    return {"noisy": x, "time": t / 1000, "prompt": prompt(1, 8, 16)}


TINY_DIT = {"dim": 64, "depth": 2, "heads": 2, "classes": 10}

add(ZooModel("DiT", "examples/dits", lambda: DiT(**TINY_DIT), labelled, IMAGE, 2))
add(ZooModel("DiT", "examples/dits, not fused", lambda: DiT(**TINY_DIT, fused=False), labelled, IMAGE, 2))
add(
    ZooModel(
        "VideoDiT",
        "examples/dits",
        lambda: VideoDiT(grid=(4, 8, 8), channels=4, dim=64, depth=2, heads=2, text_dim=16),
        video_dit,
        VIDEO,
        2,
        {CROSS: 2},
        skips=False,
    )
)
