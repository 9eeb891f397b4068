"""DiT, the image model of Peebles and Xie (arXiv 2212.09748), with attention as timm writes it. Run it for a report."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn

import lite_compile


class Attention(nn.Module):
    """One projection to q, k and v; then fused attention, or the products and the softmax one by one."""

    def __init__(self, dim: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.scale = (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            heads = F.scaled_dot_product_attention(q, k, v)
        else:
            heads = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        out: Tensor = self.proj(heads.transpose(1, 2).flatten(2))
        return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale the channels of normalised tokens `[B, S, C]` by what the condition says, `[B, C]`."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the condition (adaLN-Zero)."""

    def __init__(self, dim: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.attn = Attention(dim, heads, fused)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))
        self.modulation = nn.Sequential(nn.SiLU(), zero_linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition).chunk(6, 1)
        x = x + gate[:, None] * self.attn(modulate(x, shift, scale))
        out: Tensor = x + mlp_gate[:, None] * self.mlp(modulate(x, mlp_shift, mlp_scale))
        return out


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer that gives zeros until it is trained, so that each block begins as the identity."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """Cosines and sines `[..., dim]` of positions or timesteps `[...]`, with periods from 2 pi to 20,000 pi."""
    frequencies = 10000 ** (-torch.arange(dim // 2, device=positions.device) / (dim // 2))
    angles = positions[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class DiT(nn.Module):
    """Predicts the noise in latents `[B, C, H, W]` at timesteps `[B]` for class labels `[B]`."""

    positions: Tensor

    def __init__(
        self,
        size: int = 32,
        channels: int = 4,
        patch: int = 2,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        classes: int = 1000,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(channels, dim, patch, patch)
        rows, columns = torch.meshgrid(torch.arange(size // patch), torch.arange(size // patch), indexing="ij")
        positions = torch.cat([sinusoids(rows, dim // 2), sinusoids(columns, dim // 2)], -1)
        self.register_buffer("positions", positions.flatten(0, 1))
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(classes + 1, dim)  # the last one stands for no class: guidance needs it
        self.blocks = nn.ModuleList([Block(dim, heads, fused) for _ in range(depth)])
        self.modulation = nn.Sequential(nn.SiLU(), zero_linear(dim, 2 * dim))
        self.unpatchify = nn.Sequential(
            zero_linear(dim, channels * patch * patch), nn.Unflatten(2, (channels, patch, patch))
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        patches = self.patchify(x)
        condition = self.time(sinusoids(t, 256).to(x.dtype)) + self.label(y)
        tokens = patches.flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens, condition)
        out: Tensor = self.unpatchify(modulate(tokens, *self.modulation(condition).chunk(2, 1)))
        out = out.unflatten(1, patches.shape[2:])  # [B, rows, columns, C, patch, patch]
        return out.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


if __name__ == "__main__":
    model = DiT().eval()
    compiled = torch.compile(model, backend="liteattention", options={"min_seq_len": 256})
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    x, y = torch.randn(1, 4, 32, 32), torch.tensor([207])
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(compiled(x, t[None], y), t, x).prev_sample
    print(lite_compile.report())
    print(lite_compile.stats(model))
