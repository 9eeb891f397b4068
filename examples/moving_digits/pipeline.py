"""The moving-digits pipeline: a stock diffusers `WanPipeline` around a small trained transformer.

`load_pipeline()` is all that a user needs; `assemble_pipeline` puts untrained or other parts together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import UMT5EncoderModel

from .identity_vae import LATENT_CHANNELS, SPATIAL_FACTOR, identity_vae
from .prompt_encoder import text_encoder, tokenizer

WEIGHTS = Path(__file__).parent / "weights"
CHECKSUMS = WEIGHTS / "SHA256SUMS"
PATCH = (1, 2, 2)
FLOW_SHIFT = 20.0
"""Pixels of a video repeat each other so much that noise hides where a digit goes only at sigma > 0.98."""


@dataclass(frozen=True)
class Setting:
    """Size of the videos, in pixels and frames, and of the model."""

    name: str
    frames: int
    side: int = 64
    heads: int = 4
    layers: int = 8
    ffn: int = 1024
    head_dim: int = 64
    text_dim: int = 128

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of the latents of one video."""
        side = self.side // SPATIAL_FACTOR
        return LATENT_CHANNELS, self.frames, side, side

    @property
    def num_frames(self) -> int:
        """What to ask a `WanPipeline` for to get `frames`: with one latent per frame it adds one, and says so."""
        return self.frames - 1

    @property
    def tokens(self) -> int:
        """Tokens of self-attention per video."""
        _, frames, height, width = self.latent_shape
        return (frames // PATCH[0]) * (height // PATCH[1]) * (width // PATCH[2])


SETTINGS = {setting.name: setting for setting in (Setting("small", frames=17), Setting("long", frames=65))}
"""`small` ships with the repository. `long` has the same architecture, and four times the frames."""


def build_transformer(setting: Setting) -> WanTransformer3DModel:
    """The denoiser of a setting, with random weights."""
    return WanTransformer3DModel(
        patch_size=PATCH, num_attention_heads=setting.heads, attention_head_dim=setting.head_dim,
        in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, text_dim=setting.text_dim, freq_dim=128,
        ffn_dim=setting.ffn, num_layers=setting.layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
    )  # fmt: skip


def assemble_pipeline(
    transformer: WanTransformer3DModel, encoder: UMT5EncoderModel, mean: Sequence[float], std: Sequence[float]
) -> WanPipeline:
    """A `WanPipeline` of these parts; `mean` and `std` of the latents, one per channel."""
    return WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=encoder.eval(),
        transformer=transformer.eval(),
        vae=identity_vae(list(mean), list(std)).eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
        ),
    )


def save_weights(
    path: Path, transformer: WanTransformer3DModel, encoder: UMT5EncoderModel, metadata: Mapping[str, str]
) -> Path:
    """Write both models to one safetensors file, in bfloat16; `load_pipeline` needs some of the metadata.

    `path` never holds half a file: an earlier one stays until the new one is complete.
    """
    tensors = {
        name: parameter.detach().to("cpu", torch.bfloat16).contiguous()
        for name, parameter in _parameters(transformer, encoder).items()
    }
    partial = path.with_name(f"{path.name}.part")
    save_file(tensors, partial, dict(metadata))
    return partial.replace(path)


def _parameters(transformer: WanTransformer3DModel, encoder: UMT5EncoderModel) -> dict[str, nn.Parameter]:
    """The parameters of both models, by their names in a file of weights."""
    return dict(nn.ModuleDict({"transformer": transformer, "text_encoder": encoder}).named_parameters())


def copy_weights(path: Path, transformer: WanTransformer3DModel, encoder: UMT5EncoderModel) -> None:
    """Fill both models from a file of `save_weights`; raises `ValueError` if it holds other ones."""
    parameters = _parameters(transformer, encoder)
    _check_shapes(path, parameters)
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _check_shapes(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    expected = {name: list(parameter.shape) for name, parameter in parameters.items()}
    with safe_open(path, "pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, it is no dict
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            shape, wanted = found.get(name, "missing"), expected.get(name, "no such tensor")
            raise ValueError(f"{path} does not fit the model of its setting: {name} is {shape}, expected {wanted}")


def load_pipeline(
    weights: Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> WanPipeline:
    """The trained pipeline, a stock `WanPipeline`.

    Args:
        weights: a file of `train.py`; None for the one that ships with the repository, whose checksum is verified.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the shipped file is not the one that was committed, or another file is damaged or none of
            `train.py`'s.
    """
    setting, path = setting_of(weights), _existing(weights)
    transformer, encoder = build_transformer(setting), text_encoder(setting.text_dim)
    copy_weights(path, transformer, encoder)
    mean, std = read_latent_statistics(path)
    pipe: WanPipeline = assemble_pipeline(_cast(transformer, dtype), nn.Module.to(encoder, dtype=dtype), mean, std)
    return pipe.to(device)


def _cast(transformer: WanTransformer3DModel, dtype: torch.dtype) -> WanTransformer3DModel:
    """`transformer` in `dtype`, but for the parts that `from_pretrained` would keep in float32 as well."""
    kept = set(transformer._keep_in_fp32_modules)
    for name, parameter in transformer.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    return transformer


def setting_of(weights: Path | None = None) -> Setting:
    """What size of video a file of weights was trained on; raises whatever `load_pipeline` would, and is quick."""
    path = _existing(weights)
    if weights is None:
        verify_checksum(path)
    setting = SETTINGS[read_metadata(path)["setting"]]
    with torch.device("meta"):
        _check_shapes(path, _parameters(build_transformer(setting), text_encoder(setting.text_dim)))
    read_latent_statistics(path)
    return setting


def read_latent_statistics(path: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the latents that weights were trained on."""
    metadata = read_metadata(path)
    mean, std = (_channel_values(path, name, metadata.get(name, "null")) for name in ("latents_mean", "latents_std"))
    return mean, std


def _channel_values(path: Path, name: str, text: str) -> list[float]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        values = None
    numbers = [value for value in values if isinstance(value, (int, float))] if isinstance(values, list) else []
    if not len(numbers) == LATENT_CHANNELS == len(values):
        raise ValueError(f"{path} is damaged: {name} of its metadata is {text!r}, not {LATENT_CHANNELS} numbers")
    return numbers


def read_metadata(path: Path) -> dict[str, str]:
    """How the weights in a file came to be."""
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a file of safetensors: {error}") from error
    if metadata.get("setting") not in SETTINGS:
        raise ValueError(f"{path} was not written by examples/moving_digits/train.py: its metadata names no setting")
    return metadata


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify_checksum(path: Path) -> None:
    """Compare a shipped file with its committed checksum; raises `ValueError`."""
    listed = {name: digest for digest, name in map(str.split, CHECKSUMS.read_text().splitlines())}
    if sha256(path) != listed.get(path.name):
        raise ValueError(f"{path} differs from the file that was committed; get it again: git checkout -- {path}")


def _existing(weights: Path | None) -> Path:
    path = WEIGHTS / "small.safetensors" if weights is None else Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; make them: python examples/moving_digits/train.py")
    return path
