"""Whether the masks that a block is given stay as they are.

A tile that a mask hides is skipped at the next step, so a mask may not change from step to step. In a whole model the
graph shows what it is made from; a block that is compiled by itself is given it, and only its values tell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import NOW_EPOCH, NOW_SLOT


class MaskWatch:
    """What the masks of one block were made from when each stream began."""

    def __init__(self, now: Tensor, max_streams: int, words: int) -> None:
        with torch.inference_mode(False):
            self._known = torch.zeros(max_streams, 1 + words, dtype=torch.int32, device=now.device)
            self._now = now.clone()

    def follow(self, now: Tensor, fingerprint: Tensor) -> Tensor:
        """`now`, but without a slot if the masks are not those that its stream began with.

        Args:
            now: int32 `[NOW_WORDS]`, where the call stands.
            fingerprint: int32 `[words]` of what the masks are made from.
        """
        with torch.inference_mode(False), torch.no_grad():
            slot = now[NOW_SLOT]
            place = slot.clamp(min=0).long().reshape(1)
            known = self._known.index_select(0, place)[0]
            given = torch.cat([now[NOW_EPOCH].reshape(1), fingerprint])
            begins = (known[0] != given[0]) & (slot >= 0)
            self._known.index_copy_(0, place, torch.where(begins, given, known)[None])
            self._now.copy_(now)
            self._now[NOW_SLOT] = torch.where(begins | (known == given).all(), slot, -1)
        return self._now
