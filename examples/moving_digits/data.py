"""Videos of handwritten digits that move over a dark background as a prompt says, drawn at random.

"3 right" is one digit that moves to the right, "7 up fast and 2 left" are two, the 7 in front of the 2. A digit bounces
off the borders, so the prompt's direction is the one that it starts with. All lengths below are shares of the side of
the frame, so that a video looks the same at any side; the constants give them in pixels at a side of 64.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Split = Literal["train", "test"]

DIRECTIONS: Mapping[str, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
"""Unit vectors (x, y); y points down."""
SPEEDS = ("slow", "fast")
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MAX_ACTORS = 2

REFERENCE_SIDE = 64
SIZE = (24.0, 30.0)
SPEED_RANGES = {"slow": (0.9, 1.3), "fast": (2.4, 3.4)}
"""Pixels per frame."""
DRIFT = (0.2, 0.8)
"""Of the background, in pixels per frame."""
ROTATION, HEADING_JITTER = math.radians(10), math.radians(15)
START = 0.4
"""A digit starts in this first share of its room along its direction."""
PAIRS, UNSPECIFIED_SPEEDS = 0.4, 0.35
"""Shares of the prompts that have two actors, and of the actors without a speed."""

DIGIT_CELLS, GLYPH_CELLS, PIXELS_PER_CELL = 8, 10, 6
"""A glyph is a digit of the data set with an empty cell on each side, upsampled."""
STROKE_EDGE = (0.25, 0.7)
"""Grey levels of the data set at which a stroke begins and is opaque."""
TEXTURE_SIDE = 128
OCTAVES = {4: 1.0, 8: 0.5, 16: 0.25}
"""Cells of noise along the side of the background, and their weight."""


@dataclass(frozen=True)
class Actor:
    """One digit of a video: 0 to 9, a key of `DIRECTIONS`, one of `SPEEDS` or None for either."""

    digit: int
    direction: str
    speed: str | None = None


def parse_prompt(text: str) -> tuple[Actor, ...]:
    """The actors of a prompt, `<digit> <direction> [slow|fast] [and <digit> <direction> [slow|fast]]`, first in front.

    Raises:
        ValueError: names the word that is wrong, what may stand there, and the nearest of these.
    """
    words = text.lower().split()
    actors: list[Actor] = []
    position = 0
    while True:
        digit = _expect(text, words, position, "a digit", {**{str(n): str(n) for n in range(10)}, **_NAMED_DIGITS})
        direction = _expect(text, words, position + 1, "a direction", {word: word for word in DIRECTIONS})
        position += 2
        speed = words[position] if position < len(words) and words[position] in SPEEDS else None
        position += speed is not None
        actors.append(Actor(int(digit), direction, speed))
        if position == len(words):
            break
        if len(actors) == MAX_ACTORS:
            raise ValueError(f"{words[position]!r} in {text!r}: a prompt ends after its second digit's motion")
        following = ("and",) if speed else ("and", *SPEEDS)
        _expect(text, words, position, "a speed or a second digit", {word: word for word in following})
        position += 1
    if len({actor.digit for actor in actors}) < len(actors):
        raise ValueError(f"{str(actors[0].digit)!r} is there twice in {text!r}: the digits of a prompt differ")
    return tuple(actors)


_NAMED_DIGITS = {name: str(number) for number, name in enumerate(DIGIT_NAMES)}


def _expect(text: str, words: Sequence[str], position: int, what: str, hints: Mapping[str, str]) -> str:
    """The word at `position`, one of the values of `hints`, whose keys are what misspellings resemble."""
    allowed = list(dict.fromkeys(hints.values()))
    if position >= len(words):
        where = f"after {words[-1]!r} in {text!r}" if words else "in an empty prompt"
        raise ValueError(f"{what} is missing {where}; allowed: {', '.join(allowed)}")
    word = words[position]
    if word in allowed:
        return word
    nearest = difflib.get_close_matches(word, hints, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"{word!r} in {text!r} is not {what}; allowed: {', '.join(allowed)}; the nearest is {hints[nearest]!r}"
    )


def format_prompt(actors: Iterable[Actor]) -> str:
    """The prompt that `parse_prompt` reads as `actors`."""
    return " and ".join(" ".join(filter(None, (str(actor.digit), actor.direction, actor.speed))) for actor in actors)


def load_digits(split: Split, path: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """The handwritten digits that scikit-learn ships: every fifth of each class is in "test", the others in "train".

    Args:
        split: "train" or "test".
        path: scikit-learn's `datasets/data/digits.csv.gz`, for machines that have the file but not the package.

    Returns:
        Images float32 `[N, 8, 8]` in 0..1, sorted by class, and labels int64 `[N]`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', not {split!r}")
    if path is not None:
        numpy: Any = importlib.import_module("numpy")
        table = torch.from_numpy(numpy.loadtxt(path, delimiter=",", ndmin=2))
        if table.shape[1] != DIGIT_CELLS**2 + 1:
            raise ValueError(f"{path} is no digits.csv.gz: {table.shape[1]} columns, not {DIGIT_CELLS**2 + 1}")
        pixels, labels = table[:, :-1], table[:, -1]
    else:
        try:
            datasets: Any = importlib.import_module("sklearn.datasets")
        except ImportError as error:
            raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
        bunch = datasets.load_digits()
        pixels, labels = torch.from_numpy(bunch.data), torch.from_numpy(bunch.target)
    images, labels = pixels.float().view(-1, DIGIT_CELLS, DIGIT_CELLS) / 16, labels.long()
    chosen = []
    for digit in range(10):
        members = (labels == digit).nonzero()[:, 0]
        held_out = torch.arange(len(members)) % 5 == 0
        chosen.append(members[held_out if split == "test" else ~held_out])
    index = torch.cat(chosen)
    return images[index], labels[index]


@dataclass(frozen=True)
class Sprites:
    """n moving digits, the ones at one depth of their videos; float32 unless it says otherwise.

    Attributes:
        video: int64 `[n]`, ascending: which video of the batch.
        glyph: int64 `[n]`: which image of the split.
        size: `[n]`, of the digit's 8x8 box, in sides.
        angle: `[n]`, radians.
        colour: `[n, 3]`, RGB in 0..1.
        margin: `[n]`, least distance of the digit's centre from each border, in sides.
        start: `[n, 2]`, x and y of the centre in the first frame, in sides from `margin` on.
        velocity: `[n, 2]`, in sides per frame.
    """

    video: Tensor
    glyph: Tensor
    size: Tensor
    angle: Tensor
    colour: Tensor
    margin: Tensor
    start: Tensor
    velocity: Tensor

    def to(self, device: torch.device) -> Sprites:
        """All of it on `device`."""
        return Sprites(**{field.name: _send(getattr(self, field.name), device) for field in fields(self)})


@dataclass(frozen=True)
class Backgrounds:
    """B drifting textures, float32.

    Attributes:
        noise: one `[B, 1, cells, cells]` in 0..1 per octave.
        tints: `[B, 2, 3]`, RGB in 0..1 of the texture's darkest and brightest places.
        velocity: `[B, 2]`, in sides per frame.
    """

    noise: tuple[Tensor, ...]
    tints: Tensor
    velocity: Tensor

    def to(self, device: torch.device) -> Backgrounds:
        """All of it on `device`."""
        noise = tuple(_send(octave, device) for octave in self.noise)
        return Backgrounds(noise, _send(self.tints, device), _send(self.velocity, device))


def _send(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; from pinned memory, the host need not wait for what the device is still computing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class VideoSampler:
    """Draws prompts and videos of them; the same seed gives the same videos.

    What is random is drawn on the CPU, so that it is the same for all devices, and is little; frames are rendered on
    `device`, all of them at once and without synchronising with it.

    Args:
        split: of the digits.
        generator: on the CPU; the only source of randomness.
        device: where videos are rendered.
        frames: F, per video.
        side: height and width in pixels.
        digits: `path` of `load_digits`.
    """

    def __init__(
        self,
        split: Split,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        frames: int = 17,
        side: int = 64,
        digits: str | Path | None = None,
    ) -> None:
        if generator.device.type != "cpu":
            raise ValueError(f"the generator has to be on the CPU, not on {generator.device}")
        self.generator, self.device, self.frames, self.side = generator, torch.device(device), frames, side
        images, labels = load_digits(split, digits)
        self.counts = labels.bincount(minlength=10)
        self.glyphs = draw_glyphs(images).to(self.device)

    def sample(self, batch: int) -> tuple[Tensor, list[str]]:
        """Videos float32 `[batch, 3, F, side, side]` in -1..1, and their prompts."""
        casts = self.draw_casts(batch)
        return self.render(casts), [format_prompt(cast) for cast in casts]

    def sample_frames(self, count: int) -> tuple[Tensor, list[tuple[Actor, ...]]]:
        """A random frame each of `count` videos, float32 `[count, 3, side, side]` in -1..1, and their actors."""
        casts = self.draw_casts(count)
        times = torch.randint(self.frames, (count, 1), generator=self.generator)
        return self.render(casts, times)[:, :, 0], casts

    def draw_casts(self, batch: int) -> list[tuple[Actor, ...]]:
        """The actors of `batch` random prompts."""
        directions = tuple(DIRECTIONS)
        casts = []
        for pair, first, step, *rest in torch.rand(batch, 3 + 2 * MAX_ACTORS, generator=self.generator).tolist():
            digits = [int(10 * first)]
            if pair < PAIRS:
                digits.append((digits[0] + 1 + int(9 * step)) % 10)
            cast = []
            for number, digit in enumerate(digits):
                towards, speed = rest[2 * number : 2 * number + 2]
                fast = speed > (1 + UNSPECIFIED_SPEEDS) / 2
                word = None if speed < UNSPECIFIED_SPEEDS else SPEEDS[fast]
                cast.append(Actor(digit, directions[int(4 * towards)], word))
            casts.append(tuple(cast))
        return casts

    def render(self, casts: Sequence[tuple[Actor, ...]], times: Tensor | None = None) -> Tensor:
        """Random videos of given actors.

        Args:
            casts: the actors of each of B videos, the first in front.
            times: `[B, T]`, numbers of the frames to render, of any dtype; None for all F.

        Returns:
            float32 `[B, 3, T, side, side]` in -1..1.
        """
        if times is None:
            times = torch.arange(self.frames).expand(len(casts), -1)
        hues = torch.rand(len(casts), generator=self.generator)
        backgrounds = self.draw_backgrounds(len(casts)).to(self.device)
        layers = [self.draw_sprites(casts, depth, hues).to(self.device) for depth in range(max(map(len, casts)))]
        times = _send(times.float(), self.device)
        videos = render_backgrounds(backgrounds, times, self.side)
        for sprites in reversed(layers):
            alpha = render_sprites(sprites, self.glyphs, times[sprites.video], self.side)
            behind = videos[sprites.video]
            videos[sprites.video] = torch.lerp(behind, sprites.colour[:, :, None, None, None], alpha[:, None])
        return videos.mul_(2).sub_(1)

    def draw_sprites(self, casts: Sequence[tuple[Actor, ...]], depth: int, hues: Tensor) -> Sprites:
        """What is random about the actor at `depth` of each video that has one; `hues` `[B]` are the first one's."""
        video = torch.tensor([number for number, cast in enumerate(casts) if depth < len(cast)])
        actors = [casts[number][depth] for number in video.tolist()]
        digit = torch.tensor([actor.digit for actor in actors])
        forward = torch.tensor([DIRECTIONS[actor.direction] for actor in actors]).float()
        fast_share = torch.tensor([0.5 if actor.speed is None else float(actor.speed == "fast") for actor in actors])

        draws = torch.rand(11, len(actors), generator=self.generator)
        which, size, angle, heading, fast, speed, hue, saturation, value, along, across = draws
        glyph = self.counts.cumsum(0)[digit] - 1 - (which * self.counts[digit]).long()
        size, angle = _between(size, *SIZE) / REFERENCE_SIDE, _between(angle, -ROTATION, ROTATION)
        # The second colour is at least a fifth of the colour circle away from the first.
        colour = hsv_to_rgb(
            hues[video] + depth * _between(hue, 0.2, 0.8), _between(saturation, 0.45, 0.8), _between(value, 0.9, 1.0)
        )

        margin = size / 2 * (angle.cos() + angle.sin().abs())  # of the rotated box
        ahead, aside = START * along[:, None], across[:, None]
        share = torch.where(forward > 0, ahead, torch.where(forward < 0, 1 - ahead, aside))
        slow_speed, fast_speed = (_between(speed, *SPEED_RANGES[word]) for word in SPEEDS)
        velocity = torch.where(fast < fast_share, fast_speed, slow_speed) / REFERENCE_SIDE
        towards = torch.atan2(forward[:, 1], forward[:, 0]) + _between(heading, -HEADING_JITTER, HEADING_JITTER)
        return Sprites(
            video=video,
            glyph=glyph,
            size=size,
            angle=angle,
            colour=colour,
            margin=margin,
            start=share * (1 - 2 * margin)[:, None],
            velocity=velocity[:, None] * _unit_vector(towards),
        )

    def draw_backgrounds(self, batch: int) -> Backgrounds:
        """What is random about the backgrounds of `batch` videos."""
        noise = tuple(torch.rand(batch, 1, cells, cells, generator=self.generator) for cells in OCTAVES)
        hue, change, saturation, dark, bright, speed, towards = torch.rand(7, batch, generator=self.generator)
        saturation = _between(saturation, 0.3, 0.8)
        tints = (
            hsv_to_rgb(hue, saturation, _between(dark, 0.02, 0.12)),
            hsv_to_rgb(hue + _between(change, -0.15, 0.15), saturation, _between(bright, 0.2, 0.35)),
        )
        velocity = _between(speed, *DRIFT)[:, None] / REFERENCE_SIDE * _unit_vector(2 * math.pi * towards)
        return Backgrounds(noise, torch.stack(tints, 1), velocity)


def _between(share: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * share


def _unit_vector(angle: Tensor) -> Tensor:
    return torch.stack((angle.cos(), angle.sin()), -1)


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """`[..., 3]` in 0..1; `hue` counts turns of the colour circle, the others are in 0..1."""
    sector = (6 * hue[..., None] + torch.tensor([0.0, 4.0, 2.0], device=hue.device)) % 6
    pure = ((sector - 3).abs() - 1).clamp(0, 1)
    return value[..., None] * torch.lerp(torch.ones_like(pure), pure, saturation[..., None])


def draw_glyphs(images: Tensor) -> Tensor:
    """Crisp, anti-aliased strokes `[N, 1, G, G]` in 0..1 from digits `[N, 8, 8]` in 0..1, G = 60."""
    padded = F.pad(images[:, None], [(GLYPH_CELLS - DIGIT_CELLS) // 2] * 4)
    smooth = F.interpolate(padded, scale_factor=PIXELS_PER_CELL, mode="bicubic", align_corners=False)
    low, high = STROKE_EDGE
    edge = ((smooth - low) / (high - low)).clamp(0, 1)
    return edge * edge * (3 - 2 * edge)


def bounce(position: Tensor, room: Tensor) -> Tensor:
    """`position` on an endless line, reflected at 0 and at `room`."""
    return room - (position % (2 * room) - room).abs()


def render_sprites(sprites: Sprites, glyphs: Tensor, times: Tensor, side: int) -> Tensor:
    """Opacity of n sprites in T frames each: `[n, T, side, side]` in 0..1 (glyphs `[N, 1, G, G]`, times `[n, T]`)."""
    count, steps = times.shape
    room = (1 - 2 * sprites.margin)[:, None, None]
    travelled = sprites.start[:, None] + sprites.velocity[:, None] * times[:, :, None]
    centre = 2 * (sprites.margin[:, None, None] + bounce(travelled, room)) - 1  # in the frame's -1..1
    # From the frame to the glyph: subtract the centre, rotate back, scale.
    cos, sin = sprites.angle.cos(), sprites.angle.sin()
    rotation = torch.stack((cos, sin, -sin, cos), -1).view(count, 1, 2, 2)
    matrix = rotation / (sprites.size * GLYPH_CELLS / DIGIT_CELLS).view(count, 1, 1, 1)
    matrix = matrix.expand(count, steps, 2, 2)
    theta = torch.cat((matrix, -matrix @ centre[..., None]), -1)
    grid = F.affine_grid(theta.flatten(0, 1), [count * steps, 1, side, side], align_corners=False)
    # All frames of a sprite stand below each other in one tall picture, so that its glyph is not copied for each.
    tall = grid.view(count, steps * side, side, 2)
    opacity = F.grid_sample(glyphs[sprites.glyph], tall, mode="bilinear", align_corners=False)
    return opacity.view(count, steps, side, side)


def render_backgrounds(backgrounds: Backgrounds, times: Tensor, side: int) -> Tensor:
    """Drifting textures `[B, 3, T, side, side]` in 0..1 at times `[B, T]`; they repeat after one side."""
    batch, steps = times.shape
    texture = torch.zeros(())
    for noise, weight in zip(backgrounds.noise, OCTAVES.values(), strict=True):
        cell = TEXTURE_SIDE // noise.shape[-1]
        wrapped = F.pad(noise, [2, 2, 2, 2], mode="circular")
        large = F.interpolate(wrapped, scale_factor=cell, mode="bicubic", align_corners=False)
        texture = weight * large[..., 2 * cell : -2 * cell, 2 * cell : -2 * cell] + texture
    low, high = texture.amin((1, 2, 3), keepdim=True), texture.amax((1, 2, 3), keepdim=True)
    wrapped = F.pad((texture - low) / (high - low), [1, 1, 1, 1], mode="circular")

    pixels = (torch.arange(side, device=times.device) + 0.5) / side
    places = (pixels - backgrounds.velocity[:, None, :, None] * times[:, :, None, None]) % 1  # [B, T, x and y, side]
    places = 2 * (places * TEXTURE_SIDE + 1) / (TEXTURE_SIDE + 2) - 1
    x, y = places[:, :, 0, None, :], places[:, :, 1, :, None]
    grid = torch.stack(torch.broadcast_tensors(x, y), -1).view(batch, steps * side, side, 2)
    level = F.grid_sample(wrapped, grid, mode="bilinear", align_corners=False).view(batch, 1, steps, side, side)
    dark, bright = (tint[:, :, None, None, None] for tint in backgrounds.tints.unbind(1))
    return torch.lerp(dark, bright, level)
