"""What a calibration has done so far, in a file beside its result, so that it can go on after a crash."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

VERSION = 2


class Journal:
    """Results of finished generations by name. Written after each; taken up again if the settings are the same."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        """`path` None: nothing is written."""
        self._path, self._settings = path, json.loads(json.dumps(settings))
        self._done: dict[str, Any] = {}
        self.resumed = 0
        """How many results were taken up from an earlier attempt."""
        if path is not None and path.exists():
            self._done = self._read(path)
            self.resumed = len(self._done)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version, settings, done = content["version"], content["settings"], content["done"]
            if version != VERSION or not isinstance(done, dict):
                raise ValueError(f"version {version!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._tell(f"is damaged ({type(error).__name__}: {error})")
            return {}
        if settings != self._settings:
            names = [name for name in self._settings if settings.get(name) != self._settings[name]]
            self._tell(f"belongs to a calibration with other settings ({', '.join(names)})")
            return {}
        return done

    def _tell(self, what: str) -> None:
        warnings.warn(
            f"the partial calibration {str(self._path)!r} {what}; it is not used, and calibration starts anew",
            stacklevel=4,
        )

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of that name: `compute()`, which has to be data that JSON can hold, unless it is known."""
        if name not in self._done:
            # Through JSON and back, so that a run that was cut off goes on from the very same numbers.
            self._done[name] = json.loads(json.dumps(compute()))
            self._write()
        return self._done[name]

    def _write(self) -> None:
        if self._path is None:
            return
        partial = self._path.with_name(f"{self._path.name}.part")
        content = {"version": VERSION, "settings": self._settings, "done": self._done}
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)

    def remove(self) -> None:
        """The calibration is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
