"""The moving-digits pipeline: a VAE that only rearranges pixels, the prompt encoder, weights, and the whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from moving_digits import pipeline
from moving_digits.identity_vae import LATENT_CHANNELS, SPATIAL_FACTOR, fold, identity_vae, unfold
from moving_digits.pipeline import (
    SETTINGS,
    assemble_pipeline,
    build_transformer,
    load_pipeline,
    read_metadata,
    save_weights,
    setting_of,
)
from moving_digits.prompt_encoder import encode, text_encoder, tokenizer
from moving_digits.sampling import generate

PROMPTS = ["3 right", "7 up fast and 2 left", "", "0 down slow"]
TINY = replace(SETTINGS["small"], frames=5, side=32, layers=2)
MEAN, STD = [-0.5 + 0.01 * n for n in range(LATENT_CHANNELS)], [0.4 + 0.02 * n for n in range(LATENT_CHANNELS)]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    """Untrained, two layers."""
    torch.manual_seed(0)
    built = assemble_pipeline(build_transformer(TINY), text_encoder(TINY.text_dim), MEAN, STD)
    built.set_progress_bar_config(disable=True)
    return built


def call(pipe: WanPipeline, prompt: str | list[str] = "3 right", seed: int = 0, **changes: Any) -> Any:
    """The frames, or the latents, of two steps."""
    arguments: dict[str, Any] = {
        "height": TINY.side, "width": TINY.side, "num_frames": TINY.num_frames, "num_inference_steps": 2,
        "guidance_scale": 4.0, "output_type": "latent", "generator": torch.Generator().manual_seed(seed),
    }  # fmt: skip
    return pipe(prompt, **{**arguments, **changes}).frames


def random_video(frames: int = 9, side: int = 64) -> Tensor:
    """`[2, 3, frames, side, side]` in -1..1, whose first frames hold the extremes."""
    video = torch.rand(2, 3, frames, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    video[0, :, 0], video[1, :, 0] = 1.0, -1.0
    return video


def test_fold_moves_every_pixel_of_a_block_to_one_latent() -> None:
    latents = fold(random_video())
    assert latents.shape == (2, LATENT_CHANNELS, 9, 32, 32)
    block = random_video()[0, :, 4, 6:8, 10:12]
    torch.testing.assert_close(latents[0, :, 4, 3, 5].sort().values, block.flatten().sort().values, rtol=0, atol=0)
    assert torch.equal(unfold(latents), random_video())


def test_vae_is_fold_and_unfold() -> None:
    vae, video = identity_vae(MEAN, STD), random_video()
    posterior = vae.encode(video).latent_dist
    latents = posterior.mode()
    torch.testing.assert_close(latents, fold(video), rtol=0, atol=3e-5)
    torch.testing.assert_close(posterior.sample(torch.Generator().manual_seed(0)), latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(vae.decode(fold(video)).sample, video, rtol=0, atol=3e-5)
    torch.testing.assert_close(vae.decode(latents).sample, video, rtol=0, atol=1e-4)


def test_vae_clamps_what_overshoots() -> None:
    latents = 1.5 * fold(random_video(frames=2))
    decoded = identity_vae(MEAN, STD).decode(latents).sample
    torch.testing.assert_close(decoded, unfold(latents).clamp(-1, 1), rtol=0, atol=1e-4)


def test_vae_in_bfloat16_is_off_by_rounding() -> None:
    vae, video = identity_vae(MEAN, STD).to(torch.bfloat16), random_video(frames=5).to(torch.bfloat16)
    decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample
    # A handful of roundings to 8 bits each; the largest values are the ones with the largest steps.
    torch.testing.assert_close(decoded.float(), video.float(), rtol=4 * 2**-8, atol=0)


def test_tokenizer_knows_the_words_of_prompts_and_ends_with_eos() -> None:
    words = tokenizer()
    ids = words("7 UP fast  and 2 left").input_ids
    assert words.convert_ids_to_tokens(ids) == ["7", "up", "fast", "and", "2", "left", "</s>"]
    assert words.unk_token_id in words("nine sideways").input_ids
    known = words("0 1 2 3 4 5 6 7 8 9 right left up down slow fast and").input_ids
    assert len(set(known)) == 18
    assert words.unk_token_id not in known
    assert words("").input_ids == [words.eos_token_id]
    assert len(words("3 right " * 400, truncation=True).input_ids) == words.model_max_length


@pytest.mark.parametrize("length", [512, 16])
def test_encode_equals_what_the_pipeline_computes(pipe: WanPipeline, length: int) -> None:
    expected = pipe._get_t5_prompt_embeds(PROMPTS, max_sequence_length=length)
    embeds = encode(PROMPTS, pipe.tokenizer, pipe.text_encoder, length)
    assert embeds.shape == (len(PROMPTS), length, TINY.text_dim)
    torch.testing.assert_close(embeds, expected)
    for row, prompt in zip(embeds, PROMPTS, strict=True):
        own = len(prompt.split()) + 1
        assert (row[:own] != 0).any(1).all()
        assert not row[own:].any()


def test_encode_of_a_prompt_does_not_depend_on_its_batch(pipe: WanPipeline) -> None:
    alone = encode(PROMPTS[:1], pipe.tokenizer, pipe.text_encoder, 32)
    torch.testing.assert_close(encode(PROMPTS, pipe.tokenizer, pipe.text_encoder, 32)[:1], alone)
    assert not torch.equal(alone, encode(["3 left"], pipe.tokenizer, pipe.text_encoder, 32))


def test_encode_is_differentiable() -> None:
    encoder = text_encoder(64)
    with torch.enable_grad():
        encode(["3 right"], tokenizer(), encoder, 16).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    gradient = encoder.shared.weight.grad
    used = set(tokenizer()("3 right").input_ids)
    assert gradient is not None
    assert set(gradient.any(1).nonzero()[:, 0].tolist()) == used


def test_settings_say_how_large_latents_and_sequences_are(pipe: WanPipeline) -> None:
    assert SETTINGS["small"].tokens == 4352
    assert SETTINGS["small"].latent_shape[1:] == (SETTINGS["small"].frames, 64 // SPATIAL_FACTOR, 64 // SPATIAL_FACTOR)
    seen: list[int] = []
    hook = pipe.transformer.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    latents = call(pipe)
    hook.remove()
    assert latents.shape[1:] == TINY.latent_shape
    assert set(seen) == {TINY.tokens}


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_long_videos_fit_the_rotary_embedding_and_chunked_encoding(name: str) -> None:
    setting = SETTINGS[name]
    _, frames, height, width = setting.latent_shape
    with torch.device("meta"):
        limit = build_transformer(replace(setting, layers=1)).config.rope_max_seq_len
    assert max(frames, height // 2, width // 2) <= limit
    assert setting.frames % 4 == 1


def test_pipeline_generates_batches_of_frames(pipe: WanPipeline) -> None:
    frames = call(pipe, PROMPTS[:2], num_videos_per_prompt=2, output_type="np")
    assert frames.shape == (4, TINY.frames, TINY.side, TINY.side, 3)
    assert frames.min() >= 0
    assert frames.max() <= 1


def test_frames_are_the_latents_unfolded(pipe: WanPipeline) -> None:
    latents, frames = call(pipe), call(pipe, output_type="np")
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (MEAN, STD))
    expected = unfold(latents * std + mean).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(torch.from_numpy(frames).permute(0, 4, 1, 2, 3), expected, rtol=0, atol=1e-4)


def test_prompt_guidance_and_seed_matter(pipe: WanPipeline) -> None:
    latents = call(pipe)
    assert torch.equal(latents, call(pipe))
    for other in (call(pipe, "3 left"), call(pipe, seed=1), call(pipe, guidance_scale=1.0)):
        assert not torch.allclose(latents, other)


def test_callback_sees_and_may_change_each_step(pipe: WanPipeline) -> None:
    shapes: list[tuple[int, ...]] = []

    def silence(_: WanPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes.append(tuple(tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert not call(pipe, callback_on_step_end=silence).any()
    assert shapes == [(1, *TINY.latent_shape)] * 2


def test_scheduler_can_be_swapped(pipe: WanPipeline) -> None:
    parts = {**pipe.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    euler = WanPipeline(**parts)
    euler.set_progress_bar_config(disable=True)
    latents = call(euler)
    assert latents.isfinite().all()
    assert not torch.allclose(latents, call(pipe))


def test_pipeline_survives_save_pretrained(pipe: WanPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    again = WanPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    for name in ("transformer", "text_encoder", "vae"):
        ours, theirs = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    # Loaded weights lie at other addresses, where some CPUs add up in another order.
    torch.testing.assert_close(call(pipe, output_type="pt"), call(again, output_type="pt"), rtol=0, atol=1e-5)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKLWan"]
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A file of random weights of the shipped setting, and the models it was made of."""
    torch.manual_seed(1)
    setting = SETTINGS["small"]
    transformer, encoder = build_transformer(setting), text_encoder(setting.text_dim)
    metadata = {"setting": "small", "latents_mean": json.dumps(MEAN), "latents_std": json.dumps(STD)}
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    return save_weights(path, transformer, encoder, metadata), transformer, encoder


def test_weights_come_back_in_bfloat16_precision(weights: tuple[Path, Any, Any]) -> None:
    path, transformer, encoder = weights
    assert path.stat().st_size < 20e6
    loaded = load_pipeline(path)
    assert (loaded.vae.config.latents_mean, loaded.vae.config.latents_std) == (MEAN, STD)
    for model, original in ((loaded.transformer, transformer), (loaded.text_encoder, encoder)):
        state, expected = model.state_dict(), original.state_dict()
        assert state.keys() == expected.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, expected[name].to(torch.bfloat16).float()), name


def test_load_pipeline_casts_like_from_pretrained(weights: tuple[Path, Any, Any], tmp_path: Path) -> None:
    ours = load_pipeline(weights[0], dtype=torch.bfloat16)
    ours.transformer.save_pretrained(tmp_path)
    theirs = type(ours.transformer).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert ours.transformer.dtype == ours.text_encoder.dtype == torch.bfloat16
    assert ours.vae.dtype == torch.float32
    assert {n: p.dtype for n, p in ours.transformer.named_parameters()} == {
        n: p.dtype for n, p in theirs.named_parameters()
    }


def test_missing_weights_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python examples/moving_digits/train\.py"):
        load_pipeline(tmp_path / "none.safetensors")


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_weights(path, torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), {"setting": "huge"})
    with pytest.raises(ValueError, match="not written by"):
        load_pipeline(path)


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {other: tensor for other, tensor in tensors.items() if other != name}


BIAS = "transformer.proj_out.bias"
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], dict[str, str], str]] = {
    "a tensor is missing": (lambda tensors: without(tensors, BIAS), {}, rf"{BIAS} is missing, expected \[48\]"),
    "a shape that would broadcast": (
        lambda tensors: {**tensors, BIAS: torch.zeros(1)}, {}, rf"{BIAS} is \[1\], expected \[48\]"
    ),
    "a tensor too many": (
        lambda tensors: {**tensors, "vae.scale": torch.zeros(2)}, {}, r"vae\.scale is \[2\], expected no such tensor"
    ),
    "no mean": (lambda tensors: tensors, {"latents_mean": "null"}, "latents_mean of its metadata is 'null', not 12"),
    "too few values": (lambda tensors: tensors, {"latents_std": "[0.5]"}, r"latents_std .* is '\[0.5\]', not 12"),
    "no numbers": (lambda tensors: tensors, {"latents_std": "[1, 2"}, r"latents_std .* is '\[1, 2', not 12"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused(weights: tuple[Path, Any, Any], tmp_path: Path, damage: str) -> None:
    change, metadata, message = DAMAGES[damage]
    path = tmp_path / "damaged.safetensors"
    save_file(change(load_file(weights[0])), path, {**read_metadata(weights[0]), **metadata})
    for read in (load_pipeline, setting_of):
        with pytest.raises(ValueError, match=message):
            read(path)


def test_half_a_file_is_never_left(weights: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path, transformer, encoder = weights
    before = path.read_bytes()

    def stop(tensors: Any, partial: Path, metadata: Any) -> None:
        partial.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        save_weights(path, transformer, encoder, {})
    assert path.read_bytes() == before


def test_shipped_weights_are_verified(
    weights: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "small.safetensors"
    path.write_bytes(weights[0].read_bytes())
    checksums = tmp_path / "SHA256SUMS"
    monkeypatch.setattr(pipeline, "WEIGHTS", tmp_path)
    monkeypatch.setattr(pipeline, "CHECKSUMS", checksums)
    checksums.write_text(f"{pipeline.sha256(path)}  {path.name}\n")
    assert load_pipeline().vae.config.latents_std == STD
    for damage in (path.read_bytes()[:-1], b"nothing"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="differs from the file that was committed"):
            load_pipeline()


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("folder", ["examples/moving_digits/weights", "benchmarks/weights"])
def test_committed_weights_have_their_checksums(folder: str) -> None:
    listed = dict(reversed(line.split()) for line in (ROOT / folder / "SHA256SUMS").read_text().splitlines())
    assert listed == {path.name: pipeline.sha256(path) for path in (ROOT / folder).glob("*.safetensors")}
    assert all((ROOT / folder / name).stat().st_size < 20e6 for name in listed)


@pytest.mark.parametrize("folder", ["examples/moving_digits/weights", "benchmarks/weights"])
def test_the_card_tells_which_weights_it_is_about(folder: str) -> None:
    """Checksum, and what the last part of their training was, as their metadata have it."""
    card = (pipeline.WEIGHTS.parent / "MODEL_CARD.md").read_text()
    sections = {part.splitlines()[0]: " ".join(part.split()) for part in card.split("\n## ")[1:]}
    for path in (ROOT / folder).glob("*.safetensors"):
        (section,) = (text for text in sections.values() if f"`{path.relative_to(ROOT)}`" in text)
        assert pipeline.sha256(path)[:12] in section
        if path.stem != "classifier":
            metadata = read_metadata(path)
            assert metadata["commit"] in section
            assert f"{int(metadata['steps']):,}" in section
            assert f"{int(metadata['seconds']) / 60:.1f}" in section
            assert f"{SETTINGS[metadata['setting']].tokens:,} tokens" in section


@pytest.mark.parametrize(
    ("weights", "setting"), [(None, "small"), (ROOT / "benchmarks/weights/moving-digits-long.safetensors", "long")]
)
def test_committed_weights_load(weights: Path | None, setting: str) -> None:
    assert setting_of(weights) == SETTINGS[setting]
    loaded = load_pipeline(weights)
    assert type(loaded) is WanPipeline
    for model in (loaded.transformer, loaded.text_encoder):
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_shipped_model_generates_what_its_seed_says() -> None:
    loaded = load_pipeline()
    loaded.set_progress_bar_config(disable=True)
    first, again, other = (generate(loaded, SETTINGS["small"], ["3 right"], seed, 2, 1.0) for seed in (5, 5, 6))
    assert first.shape == (1, 3, 17, 64, 64)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
