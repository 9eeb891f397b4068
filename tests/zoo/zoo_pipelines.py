"""Pipelines of diffusers around models of the zoo: prompts come as embeddings, results are latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn
from zoo_model import Prompt
from zoo_models import ZOO, padding
from zoo_runs import OPTIONS

STEPS = 6
PIPELINES: dict[str, ZooPipeline] = {}


def flow(**config: Any) -> Any:
    return FlowMatchEulerDiscreteScheduler(**config)


@dataclass(frozen=True)
class ZooPipeline:
    """A pipeline of diffusers without text encoders and VAE."""

    class_name: str
    model: str
    """Name of its model in the zoo."""
    arguments: Callable[[Prompt, Prompt], dict[str, Any]]
    """Arguments of its call, for a prompt and a negative one."""
    scheduler: Callable[[], Any] = flow
    parts: Mapping[str, Any] = field(default_factory=dict)
    """What else it is made of."""
    denoisers: tuple[str, ...] = ("transformer",)

    def build(self) -> tuple[Any, list[nn.Module]]:
        """The pipeline around new models that are compiled, and these models."""
        kind = getattr(diffusers, self.class_name)
        denoisers = {name: ZOO[self.model].make() for name in self.denoisers}
        pipeline = kind(**{**absent_parts(kind), "scheduler": self.scheduler(), **denoisers, **self.parts})
        options = {**OPTIONS, "threshold": -1.0}
        for name, model in denoisers.items():
            setattr(pipeline, name, torch.compile(model, backend="liteattention", options=options))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline, list(denoisers.values())

    def generate(self, pipeline: Any, number: int) -> Tensor:
        """Generation `number`, as latents."""
        result: Tensor = pipeline(
            **self.arguments(Prompt(10 * number), Prompt(10 * number + 1)),
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(number),
            output_type="latent",
            return_dict=False,
        )[0]
        return result


def absent_parts(kind: type) -> dict[str, Any]:
    """None for every part of a pipeline that has no default."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]  # type: ignore[misc]
    return {p.name: None for p in parameters if p.default is inspect.Parameter.empty}


def add(*args: Any, variant: str = "", **kwargs: Any) -> None:
    pipeline = ZooPipeline(*args, **kwargs)
    PIPELINES[pipeline.class_name + variant] = pipeline


def generate_alone(name: str, number: int) -> Tensor:
    """A generation of a pipeline that has never run before."""
    pipeline, _ = PIPELINES[name].build()
    return PIPELINES[name].generate(pipeline, number)


def text(p: Prompt, n: Prompt) -> dict[str, Any]:
    return {"prompt_embeds": p(1, 8, 16), "negative_prompt_embeds": n(1, 8, 16), "guidance_scale": 4.0}


def masked(p: Prompt, n: Prompt) -> dict[str, Any]:
    masks = {"prompt_attention_mask": padding(), "negative_prompt_attention_mask": padding()}
    return {**text(p, n), **masks, "negative_prompt": None}


def pooled(p: Prompt, n: Prompt) -> dict[str, Any]:
    return {**text(p, n), "pooled_prompt_embeds": p(1, 8), "negative_pooled_prompt_embeds": n(1, 8)}


def wan(p: Prompt, n: Prompt) -> dict[str, Any]:
    return {**text(p, n), "height": 128, "width": 128, "num_frames": 13}


def hunyuan_video(p: Prompt, n: Prompt) -> dict[str, Any]:
    return {**masked(p, n), **pooled(p, n), **wan(p, n), "true_cfg_scale": 4.0}


def kandinsky(p: Prompt, n: Prompt) -> dict[str, Any]:
    arguments: dict[str, Any] = {"height": 128, "width": 128, "num_frames": 13}
    for prefix, prompt in (("", p), ("negative_", n)):
        arguments[f"{prefix}prompt_embeds_qwen"] = prompt(1, 8, 16)
        arguments[f"{prefix}prompt_embeds_clip"] = prompt(1, 8)
        arguments[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, 8])
    return arguments


def image(embeddings: Callable[[Prompt, Prompt], dict[str, Any]], **more: Any) -> Callable[..., dict[str, Any]]:
    """Arguments for an image of 256x256 pixels."""
    return lambda p, n: {**embeddings(p, n), "height": 256, "width": 256, **more}


def chroma(p: Prompt, n: Prompt) -> dict[str, Any]:
    masks = {"prompt_attention_mask": padding().float(), "negative_prompt_attention_mask": padding().float()}
    return {**text(p, n), **masks}


def qwen_image(p: Prompt, n: Prompt) -> dict[str, Any]:
    masks = {"prompt_embeds_mask": torch.ones(1, 8), "negative_prompt_embeds_mask": torch.ones(1, 8)}
    return {**text(p, n), **masks, "guidance_scale": None, "true_cfg_scale": 4.0}


def hunyuan_dit(p: Prompt, n: Prompt) -> dict[str, Any]:
    arguments: dict[str, Any] = {"guidance_scale": 4.0, "use_resolution_binning": False}
    for prefix, prompt in (("", p), ("negative_", n)):
        for suffix in ("", "_2"):
            arguments[f"{prefix}prompt_embeds{suffix}"] = prompt(1, 8, 16)
            arguments[f"{prefix}prompt_attention_mask{suffix}"] = padding()
    return arguments


def z_image(p: Prompt, n: Prompt) -> dict[str, Any]:
    return {"prompt_embeds": [p(8, 16)], "negative_prompt_embeds": [n(8, 16)], "guidance_scale": 4.0}


def ddim() -> Any:
    """Clipping would replace the latents of an untrained model within one step."""
    return DDIMScheduler(clip_sample=False)


def flow_unipc() -> Any:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def flow_dpm() -> Any:
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


add("WanPipeline", "WanTransformer3DModel-Wan-2-1", wan)
add(
    "WanPipeline", "WanTransformer3DModel-Wan-2-1", wan, flow_unipc, {"boundary_ratio": 0.8},
    ("transformer", "transformer_2"), variant="-two-experts",
)  # fmt: skip
add(
    "WanPipeline", "WanTransformer3DModel-Wan-2-2-5B", wan, flow_unipc, {"expand_timesteps": True},
    variant="-per-token-timesteps",
)  # fmt: skip
add("SkyReelsV2Pipeline", "SkyReelsV2Transformer3DModel", wan, flow_unipc)
add("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", hunyuan_video)
add("LTXPipeline", "LTXVideoTransformer3DModel", image(masked, num_frames=25))
add("CogVideoXPipeline", "CogVideoXTransformer3DModel", wan, CogVideoXDDIMScheduler)
add("CogView3PlusPipeline", "CogView3PlusTransformer2DModel", image(text), CogVideoXDDIMScheduler)
add("CogView4Pipeline", "CogView4Transformer2DModel", image(text))
add(
    "MochiPipeline", "MochiTransformer3DModel",
    lambda p, n: {**masked(p, n), "height": 128, "width": 128, "num_frames": 19}, lambda: flow(invert_sigmas=True),
)  # fmt: skip
add(
    "AllegroPipeline", "AllegroTransformer3DModel",
    lambda p, n: {**masked(p, n), "height": 128, "width": 128, "num_frames": 16}, ddim,
)  # fmt: skip
add("LattePipeline", "LatteTransformer3DModel", image(text, negative_prompt=None, video_length=4), ddim)
add("Kandinsky5T2VPipeline", "Kandinsky5Transformer3DModel", kandinsky)
add("FluxPipeline", "FluxTransformer2DModel-dev", image(pooled, true_cfg_scale=4.0))
add("ChromaPipeline", "ChromaTransformer2DModel", image(chroma))
add("StableDiffusion3Pipeline", "SD3Transformer2DModel", image(pooled))
add("QwenImagePipeline", "QwenImageTransformer2DModel", image(qwen_image))
add("AuraFlowPipeline", "AuraFlowTransformer2DModel", image(masked))
add(
    "PixArtSigmaPipeline", "PixArtTransformer2DModel", image(masked, use_resolution_binning=False),
    DPMSolverMultistepScheduler,
)  # fmt: skip
add(
    "SanaPipeline", "SanaTransformer2DModel",
    lambda p, n: {**masked(p, n), "height": 512, "width": 512, "use_resolution_binning": False}, flow_dpm,
)  # fmt: skip
add("HunyuanDiTPipeline", "HunyuanDiT2DModel", image(hunyuan_dit), ddim, {"requires_safety_checker": False})
add("Lumina2Pipeline", "Lumina2Transformer2DModel", image(masked))
add("LuminaPipeline", "LuminaNextDiT2DModel", image(masked))
add("ZImagePipeline", "ZImageTransformer2DModel", image(z_image))
