"""What a sample shows, measured: which digits, moving where, and how far two videos differ.

    python examples/moving_digits/metrics.py --train-classifier

trains the classifier of digits again, saves it, and measures it on digits that it has not seen.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import at_least, blame, existing_file, usable_device

from moving_digits.data import DIRECTIONS, REFERENCE_SIDE, SPEED_RANGES, Actor, VideoSampler, load_digits, parse_prompt

WEIGHTS = Path(__file__).parent / "weights" / "classifier.safetensors"

FRAMES_PER_CALL = 1056
"""That many go through the classifier at once."""

TRACKED_FRAMES = 5
"""No digit reaches the border that it moves towards in these, at any speed of the data."""
LEAST_CONTRAST = 0.2
"""Between foreground and background, of the full range; a video with less shows no digit."""
LEAST_SPEED = 0.15 / REFERENCE_SIDE
"""In sides per frame; slower than that is standing still."""
FAST = (SPEED_RANGES["slow"][1] + SPEED_RANGES["fast"][0]) / 2 / REFERENCE_SIDE
"""In sides per frame; from there on a digit is fast."""
MEDIAN_STEP, LONGEST_STEP = (0.75, 1.25), 1.5
"""Steps from frame to frame of a steady motion, in starting speeds; the data has 0.95 to 1.05, and at most 1.15."""


class DigitClassifier(nn.Module):
    """Says which digits are in a frame: logits of ten independent yes-or-no questions."""

    def __init__(self) -> None:
        super().__init__()
        widths = (24, 48, 64, 96)
        self.features = nn.Sequential(
            nn.Conv2d(3, widths[0], 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
            *_block(widths[0], widths[1]),
            nn.MaxPool2d(2),
            *_block(widths[1], widths[2]),
            nn.MaxPool2d(2),
            *_block(widths[2], widths[3]),
        )
        self.head = nn.Linear(widths[3], 10)

    def forward(self, frames: Tensor) -> Tensor:
        """Logits `[N, 10]` of frames `[N, 3, H, W]` in -1..1; sides other than 64 are resized to it."""
        frames = frames.to(self.head.weight.dtype)
        if frames.shape[-2:] != (REFERENCE_SIDE, REFERENCE_SIDE):
            frames = F.interpolate(frames, (REFERENCE_SIDE,) * 2, mode="bilinear", antialias=True, align_corners=False)
        logits: Tensor = self.head(self.features(frames).amax((2, 3)))
        return logits

    @torch.no_grad()
    def classify_videos(self, videos: Tensor) -> Tensor:
        """Logits `[B, 10]`, float32 on the CPU, of videos `[B, 3, F, H, W]` in -1..1: the mean over their frames."""
        batch, _, count = videos.shape[:3]
        frames = videos.transpose(1, 2).flatten(0, 1)
        device = self.head.weight.device
        logits = torch.cat([self(part.to(device)).float().cpu() for part in frames.split(FRAMES_PER_CALL)])
        return logits.view(batch, count, 10).mean(1)


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def train_classifier(
    steps: int = 3000, seed: int = 0, device: torch.device | str = "cpu", batch: int = 64, digits: str | None = None
) -> DigitClassifier:
    """A `DigitClassifier` trained on single frames of fresh videos of the split "train", in evaluation mode.

    Args:
        steps: of AdamW, under a one-cycle schedule.
        seed: of weights, videos and augmentation.
        device: where it is trained; the classifier stays there.
        batch: frames per step.
        digits: `path` of `load_digits`.
    """
    generator = torch.Generator().manual_seed(seed)
    sampler = VideoSampler("train", generator, device, digits=digits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitClassifier().to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps)
    progress = tqdm(range(steps), desc="classifier", unit="step")
    for step in progress:
        frames, casts = sampler.sample_frames(batch)
        targets = torch.zeros(batch, 10)
        for row, cast in zip(targets, casts, strict=True):
            row[[actor.digit for actor in cast]] = 1
        logits = classifier(augment(frames, generator))
        loss = F.binary_cross_entropy_with_logits(logits, targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    return classifier.eval()


def augment(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Frames `[N, 3, H, W]` in -1..1, each deformed, blurred, recoloured and noised a little, as a model's samples are.

    The generator is on the CPU.
    """
    count, side, device = len(frames), frames.shape[-1], frames.device
    draws = torch.rand(10, count, generator=generator).to(device)
    # Stretching, shearing and moving by a few per cent.
    identity = torch.eye(2, 3, device=device)
    limits = torch.tensor([[0.08, 0.12, 0.06], [0.08, 0.08, 0.06]], device=device)
    theta = identity + limits * (2 * draws[:6].T.reshape(count, 2, 3) - 1)
    grid = F.affine_grid(theta, list(frames.shape), align_corners=False)
    frames = F.grid_sample(frames, grid, padding_mode="reflection", align_corners=False)
    # A blur of up to 1.2 pixels in half of the frames.
    sigma = (2.4 * draws[6] - 1.2).clamp(min=0.05) * side / REFERENCE_SIDE
    offsets = torch.arange(-3, 4, device=device)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma[:, None] ** 2), -1).repeat_interleave(3, 0)
    planes = F.pad(frames, [3, 3, 3, 3], mode="replicate").flatten(0, 1)[None]
    for shape in ((-1, 1, 1, 7), (-1, 1, 7, 1)):
        planes = F.conv2d(planes, kernel.view(shape), groups=3 * count)
    frames = planes.view(count, 3, side, side)
    contrast, brightness = 0.8 + 0.4 * draws[7], 0.2 * draws[8] - 0.1
    frames = frames * contrast[:, None, None, None] + brightness[:, None, None, None]
    noise = torch.randn(frames.shape, generator=generator).to(device)
    return frames + 0.12 * draws[9][:, None, None, None] * noise


def save_classifier(classifier: DigitClassifier, path: str | Path = WEIGHTS) -> None:
    """Write the weights in float16."""
    half = {name: x.cpu().half() if x.is_floating_point() else x.cpu() for name, x in classifier.state_dict().items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in half.items()}, path)


def load_classifier(path: str | Path = WEIGHTS, device: torch.device | str = "cpu") -> DigitClassifier:
    """The classifier that comes with this package, float32 and in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no classifier at {path}; make one: metrics.py --train-classifier")
    classifier = DigitClassifier()
    try:
        classifier.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} was not written by metrics.py: {str(error).splitlines()[0]}") from error
    return classifier.eval().to(device)


@dataclass(frozen=True)
class Motion:
    """How the only digit of a video moves.

    Attributes:
        direction: a key of `DIRECTIONS`, where it starts to move.
        speed: "slow" or "fast".
        steady: it is seen in every frame, neither stops nor jumps.
    """

    direction: str
    speed: str
    steady: bool


def measure_motion(video: Tensor) -> Motion | None:
    """The motion in a video `[3, F, H, W]` in -1..1, by tracking its bright pixels; None if nothing moves there."""
    times, centres = track(video[:, :TRACKED_FRAMES])
    if len(times) < 3:
        return None
    # The median of the slopes between all pairs of frames: a few bad centres do not move it.
    first, second = torch.combinations(torch.arange(len(times))).unbind(1)
    slopes = (centres[second] - centres[first]) / (times[second] - times[first])[:, None]
    velocity = slopes.median(0).values
    if velocity.abs().max() < LEAST_SPEED:
        return None
    axes, speed = torch.tensor(list(DIRECTIONS.values())).float(), velocity.norm()
    direction = list(DIRECTIONS)[int((axes @ velocity).argmax())]
    return Motion(direction, "fast" if speed > FAST else "slow", is_steady(video, float(speed)))


def is_steady(video: Tensor, speed: float) -> bool:
    """Whether the digit of a video keeps the speed, in sides per frame, that it starts with."""
    times, centres = track(video)
    if len(times) < video.shape[1]:
        return False
    steps = centres.diff(dim=0).norm(dim=1) / speed
    least, most = MEDIAN_STEP
    return least < float(steps.median()) < most and float(steps.max()) < LONGEST_STEP


def track(video: Tensor) -> tuple[Tensor, Tensor]:
    """The n frames of a video `[3, F, H, W]` in -1..1 that show a digit: numbers `[n]`, centres `[n, 2]` in sides."""
    # A digit's colour is saturated and bright: it has a channel close to 1, and no channel of the background has.
    level = (video.float().cpu().amax(0) + 1) / 2  # [F, H, W]
    sampled = level.flatten()
    background, foreground = sampled.median(), sampled.quantile(0.99)
    if foreground - background < LEAST_CONTRAST:
        return torch.zeros(0), torch.zeros(0, 2)
    weight = (level - (background + foreground) / 2).clamp(min=0)
    mass = weight.sum((1, 2))
    seen = mass > 0.3 * mass.median()
    height, width = level.shape[1:]
    x = (weight.sum(1) * torch.arange(width)).sum(1)[seen] / mass[seen] / width
    y = (weight.sum(2) * torch.arange(height)).sum(1)[seen] / mass[seen] / height
    return torch.arange(len(level))[seen], torch.stack((x, y), -1)


@dataclass(frozen=True)
class Evaluation:
    """How many videos show what their prompts say; evaluations of different videos can be added.

    Attributes:
        singles: videos with one actor.
        single_digits: those of them whose likeliest digit is the prompt's.
        directions: those of them that start in the prompt's direction.
        steady: those of them whose digit is in every frame and neither stops nor jumps.
        named_speeds: those of them whose prompt names a speed.
        speeds: those of these that have it.
        pairs: videos with two actors.
        pair_digits: those of them whose two likeliest digits are the prompt's.
    """

    singles: int = 0
    single_digits: int = 0
    directions: int = 0
    steady: int = 0
    named_speeds: int = 0
    speeds: int = 0
    pairs: int = 0
    pair_digits: int = 0

    @property
    def single_accuracy(self) -> float:
        """Share of the videos with one actor that show its digit; NaN if there are none."""
        return _share(self.single_digits, self.singles)

    @property
    def direction_accuracy(self) -> float:
        """Share of the videos with one actor that start in its direction; NaN if there are none."""
        return _share(self.directions, self.singles)

    @property
    def steadiness(self) -> float:
        """Share of the videos with one actor that moves steadily to the end; NaN if there are none."""
        return _share(self.steady, self.singles)

    @property
    def speed_accuracy(self) -> float:
        """Share of the videos with one actor of a given speed that have it; NaN if there are none."""
        return _share(self.speeds, self.named_speeds)

    @property
    def pair_accuracy(self) -> float:
        """Share of the videos with two actors that show both digits; NaN if there are none."""
        return _share(self.pair_digits, self.pairs)

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def evaluate(
    videos: Tensor, prompts: Sequence[str | tuple[Actor, ...]], classifier: DigitClassifier | None = None
) -> Evaluation:
    """Compare videos `[B, 3, F, H, W]` in -1..1 with their B prompts, as texts or as actors."""
    if len(videos) != len(prompts):
        raise ValueError(f"{len(videos)} videos, but {len(prompts)} prompts")
    casts = [parse_prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    ranking = (classifier or load_classifier()).classify_videos(videos).argsort(1, descending=True).tolist()
    result = Evaluation()
    for video, cast, ranked in zip(videos, casts, ranking, strict=True):
        right = set(ranked[: len(cast)]) == {actor.digit for actor in cast}
        if len(cast) == 1:
            result += _evaluate_single(cast[0], right, measure_motion(video))
        else:
            result += Evaluation(pairs=1, pair_digits=right)
    return result


def _evaluate_single(actor: Actor, right_digit: bool, motion: Motion | None) -> Evaluation:
    return Evaluation(
        singles=1,
        single_digits=right_digit,
        directions=motion is not None and motion.direction == actor.direction,
        steady=motion is not None and motion.steady,
        named_speeds=actor.speed is not None,
        speeds=motion is not None and motion.speed == actor.speed,
    )


def psnr(a: Tensor, b: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Peak signal-to-noise ratio in dB: `[...]` for videos `[..., C, F, H, W]`; infinite if they are equal.

    Args:
        a: any float dtype; computed in float32.
        b: as `a`.
        value_range: least and largest value, (-1, 1) or (0, 1).
    """
    low, high = value_range
    error = (a.float() - b.float()).square().mean((-4, -3, -2, -1))
    return 10 * torch.log10((high - low) ** 2 / error)


def ssim(a: Tensor, b: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Structural similarity: `[...]` for videos `[..., C, F, H, W]`, the mean over frames and channels.

    Windows are gaussians of 11 x 11 pixels and sigma 1.5 that lie wholly inside of the frame; constants 0.01 and 0.03
    (Wang et al., Image quality assessment, 2004). Arguments as those of `psnr`.
    """
    low, high = value_range
    height, width = a.shape[-2:]
    if min(height, width) < 11:
        raise ValueError(f"ssim needs frames of 11 x 11 pixels or more, not {height} x {width}")
    if a.shape != b.shape:
        raise ValueError(f"two videos of one shape are compared, not {tuple(a.shape)} and {tuple(b.shape)}")
    planes = [((x.float() - low) / (high - low)).reshape(-1, 1, height, width) for x in (a, b)]
    offsets = torch.arange(-5, 6, device=a.device)
    kernel = torch.softmax(-(offsets**2) / (2 * 1.5**2), 0)

    def average(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, 11)), kernel.view(1, 1, 11, 1))

    x, y = planes
    mean_x, mean_y = average(x), average(y)
    variance_x, variance_y = average(x * x) - mean_x**2, average(y * y) - mean_y**2
    covariance = average(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variance_x + variance_y + 0.03**2)
    return (luminance * structure).reshape(*a.shape[:-2], -1).mean((-3, -2, -1))


def evaluate_held_out(
    classifier: DigitClassifier, videos: int, seed: int, device: torch.device | str = "cpu", digits: str | None = None
) -> Evaluation:
    """`evaluate` on that many rendered videos of the split "test": what a perfect model of the data would get."""
    sampler = VideoSampler("test", torch.Generator().manual_seed(seed), device, digits=digits)
    result = Evaluation()
    for start in tqdm(range(0, videos, 64), desc="held-out videos", unit="batch"):
        result += evaluate(*sampler.sample(min(64, videos - start)), classifier)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--train-classifier", action="store_true", help="train and save the classifier before measuring"
    )
    parser.add_argument("--steps", type=at_least(2), default=3000, help="of training (default: 3000)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of training (default: 0)")
    parser.add_argument(
        "--videos", type=at_least(1), default=1024, help="held-out videos to measure on (default: 1024)"
    )
    parser.add_argument("--device", type=usable_device, default="cpu", help="where to train and render (default: cpu)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="file of the classifier")
    parser.add_argument(
        "--digits", type=existing_file, help="scikit-learn's digits.csv.gz, if the package is not installed"
    )
    args = parser.parse_args(arguments)
    with blame("--digits", parser):
        load_digits("test", args.digits)
    with blame("--weights", parser):
        if not args.train_classifier:
            load_classifier(args.weights)
        elif args.weights.is_dir():
            raise IsADirectoryError(f"{args.weights} is a folder")
    if args.train_classifier:
        trained = train_classifier(args.steps, args.seed, args.device, digits=args.digits)
        save_classifier(trained, args.weights)
    classifier = load_classifier(args.weights, args.device)
    result = evaluate_held_out(classifier, args.videos, args.seed + 1, args.device, args.digits)
    print(f"held-out digits, one actor ({result.singles} videos): digit right in {result.single_accuracy:.2%}")
    print(f"held-out digits, two actors ({result.pairs} videos): both digits right in {result.pair_accuracy:.2%}")
    print(f"of the videos with one actor: direction right in {result.direction_accuracy:.2%}", end=", ")
    print(f"speed, where the prompt has one, in {result.speed_accuracy:.2%}; steady {result.steadiness:.2%}")


if __name__ == "__main__":
    main()
