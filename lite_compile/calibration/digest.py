"""Tell what calibrations are given apart, without keeping it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def digest(value: Any) -> str:
    """Differs where values do: tensors and arrays, in lists and dicts too, count by all that they hold."""
    return hashlib.sha256(_text(value).encode()).hexdigest()[:16]


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return _array_text(value.dtype, value.shape, numbers)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return _array_text(value.dtype, value.shape, value.tobytes())
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_text(part)}' for key, part in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return repr(value)


def _array_text(dtype: Any, shape: tuple[int, ...], numbers: bytes) -> str:
    return f"{dtype}{list(shape)}:{hashlib.sha256(numbers).hexdigest()}"
