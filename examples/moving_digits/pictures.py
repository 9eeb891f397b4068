"""Videos as animated GIFs and contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

FRAMES_PER_SECOND = 12
LABEL_HEIGHT = 14


def save_gif(video: Tensor, path: Path, scale: int = 4) -> Path:
    """Write a video `[3, F, H, W]` in 0..1 as a GIF that repeats, `scale` times as large."""
    return _write(to_images(video, scale), path)


def save_gif_grid(rows: Sequence[Sequence[Tensor]], labels: Sequence[str], path: Path, scale: int = 2) -> Path:
    """Write rows of videos `[3, F, H, W]` in 0..1 side by side, with one label above each column."""
    columns = [torch.cat([F.pad(row[i], (1, 1, 1, 1)) for row in rows], 2) for i in range(len(rows[0]))]
    width = columns[0].shape[-1] * scale
    frames = []
    for parts in zip(*(to_images(column, scale) for column in columns), strict=True):
        sheet = Image.new("RGB", (width * len(parts), parts[0].height + LABEL_HEIGHT), "white")
        draw = ImageDraw.Draw(sheet)
        for number, (part, label) in enumerate(zip(parts, labels, strict=True)):
            sheet.paste(part, (number * width, LABEL_HEIGHT))
            draw.text((number * width + 3, 1), label, fill="black")
        frames.append(sheet)
    return _write(frames, path)


def save_contact_sheet(videos: Sequence[Tensor], labels: Sequence[str], path: Path, frames: int = 6) -> Path:
    """Write `frames` evenly chosen frames of each video `[3, F, H, W]` in 0..1 in a row, its label above them."""
    scale = 2
    side = videos[0].shape[-1] * scale
    sheet = Image.new("RGB", (side * frames, (side + LABEL_HEIGHT) * len(videos)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (video, label) in enumerate(zip(videos, labels, strict=True)):
        top = number * (side + LABEL_HEIGHT)
        draw.text((3, top + 1), label, fill="black")
        chosen = torch.linspace(0, video.shape[1] - 1, frames).round().long()
        for column, image in enumerate(to_images(video[:, chosen], scale)):
            sheet.paste(image, (column * side, top + LABEL_HEIGHT))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def to_images(video: Tensor, scale: int = 1) -> list[Image.Image]:
    """The frames of a video `[3, F, H, W]` in 0..1."""
    pixels = (video.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 3, 0).contiguous()
    images = [Image.fromarray(frame.numpy(), "RGB") for frame in pixels]
    return [image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC) for image in images]


def _write(frames: Sequence[Image.Image], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    duration = round(1000 / FRAMES_PER_SECOND)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0, optimize=True)
    return path
