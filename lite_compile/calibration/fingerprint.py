"""What tells one model from another: class, names and shapes of parameters. Their values are not looked at."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

_CALL = nn.Module._wrapped_call_impl.__code__


@dataclass(frozen=True)
class Fingerprint:
    """Of a model; adapters that are added to it (LoRA) do not change it."""

    name: str
    """Of the class."""
    parameters: int
    """How many numbers."""
    digest: str
    """Of the parameters' names and shapes, 16 hexadecimal digits."""

    def __str__(self) -> str:
        return f"{self.name} with {self.parameters:,} parameters (digest {self.digest})"


def fingerprint(model: nn.Module) -> Fingerprint:
    """Of `model`, compiled or not."""
    original = getattr(model, "_orig_mod", model)
    shapes = {}
    for name, parameter in original.named_parameters():
        parts = [part for part in name.split(".") if part not in ("_orig_mod", "base_layer")]
        if not any(part.startswith("lora_") for part in parts):
            shapes[".".join(parts)] = tuple(parameter.shape)
    text = "\n".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
    count = sum(_product(shape) for shape in shapes.values())
    return Fingerprint(type(original).__name__, count, hashlib.sha256(text.encode()).hexdigest()[:16])


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def calling_modules(parameters: Sequence[Tensor]) -> list[nn.Module]:
    """The modules whose calls the running code is part of and that own all `parameters`, the outermost first."""
    wanted = {id(parameter) for parameter in parameters}
    return [m for m in _modules_above() if wanted <= {id(tensor) for tensor in (*m.parameters(), *m.buffers())}][::-1]


def _modules_above() -> Iterator[nn.Module]:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            module = frame.f_locals["self"]
            yield getattr(module, "_orig_mod", module)
        frame = frame.f_back  # type: ignore[assignment]
