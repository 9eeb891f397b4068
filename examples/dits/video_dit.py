"""A text-to-video DiT in the manner of Movie Gen (arXiv 2410.13720), its attention written out. Run it for a report."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lite_compile


class Attention(nn.Module):
    """Attention from tokens `[B, S, C]` to themselves or to a prompt, by einsum and softmax in fp32."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = nn.RMSNorm(dim // heads), nn.RMSNorm(dim // heads)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            w(y).unflatten(-1, (self.heads, -1)) for w, y in ((self.wq, x), (self.wk, context), (self.wv, context))
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", self.q_norm(q), self.k_norm(k)) / math.sqrt(q.shape[-1])
        weights = scores.float().softmax(-1).to(v.dtype)
        out: Tensor = self.wo(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
        return out


class Block(nn.Module):
    """Full attention over space and time, cross-attention to the prompt, SwiGLU; scaled and gated by the time."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(dim) for _ in range(3)])
        self.self_attn, self.cross_attn = Attention(dim, heads), Attention(dim, heads)
        self.w1, self.w2, self.w3 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim), nn.Linear(dim, 4 * dim)
        self.modulation = nn.Linear(dim, 4 * dim)

    def forward(self, x: Tensor, prompt: Tensor, time: Tensor) -> Tensor:
        scale, gate, mlp_scale, mlp_gate = self.modulation(time)[:, None].chunk(4, -1)
        y = self.norms[0](x) * (1 + scale)
        x = x + gate * self.self_attn(y, y)
        x = x + self.cross_attn(self.norms[1](x), prompt)
        y = self.norms[2](x) * (1 + mlp_scale)
        out: Tensor = x + mlp_gate * self.w2(F.silu(self.w1(y)) * self.w3(y))
        return out


class VideoDiT(nn.Module):
    """Predicts the velocity of latents `[B, C, F, H, W]` at times `[B]` in [0, 1] for prompts `[B, T, text_dim]`.

    Positions are learned for each axis and added up.
    """

    def __init__(
        self,
        grid: tuple[int, int, int] = (4, 16, 16),
        channels: int = 16,
        patch: int = 2,
        dim: int = 256,
        depth: int = 4,
        heads: int = 4,
        text_dim: int = 64,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.patchify = nn.Conv3d(channels, dim, (1, patch, patch), (1, patch, patch))
        self.frame, self.row, self.column = (nn.Parameter(torch.randn(size, dim) / 50) for size in grid)
        self.text = nn.Sequential(nn.Linear(text_dim, dim), nn.LayerNorm(dim))
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm, self.unpatchify = nn.RMSNorm(dim), nn.Linear(dim, channels * patch * patch)

    def forward(self, noisy: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        patches = self.patchify(noisy)
        frames, rows, columns = patches.shape[2:]
        positions = self.frame[:frames, None, None] + self.row[:rows, None] + self.column[:columns]
        tokens = patches.flatten(2).transpose(1, 2) + positions.flatten(0, 2)
        text, when = self.text(prompt), self.time(self.embed(time).to(tokens.dtype))
        for block in self.blocks:
            tokens = block(tokens, text, when)
        out: Tensor = self.unpatchify(self.norm(tokens)).unflatten(1, (frames, rows, columns))
        out = out.unflatten(-1, (-1, self.patch, self.patch))  # [B, F, rows, columns, C, patch, patch]
        return out.permute(0, 4, 1, 2, 5, 3, 6).reshape(noisy.shape)

    def embed(self, time: Tensor) -> Tensor:
        """Cosines and sines `[B, dim]` of the time."""
        half = self.row.shape[-1] // 2
        angles = 1000 * time[:, None].float() * 10000 ** (-torch.arange(half, device=time.device) / half)
        return torch.cat([angles.cos(), angles.sin()], -1)


if __name__ == "__main__":
    model = VideoDiT().eval()
    compiled = torch.compile(model, backend="liteattention", options={"min_seq_len": 1024})
    noisy, prompt = torch.randn(1, 16, 4, 32, 32), torch.randn(1, 8, 64)
    with torch.no_grad():
        for step in range(10):
            noisy = noisy - 0.1 * compiled(noisy, torch.tensor([1 - step / 10]), prompt)
    print(lite_compile.report())
    print(lite_compile.stats(model))
