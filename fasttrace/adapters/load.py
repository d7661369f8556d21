"""`load`: a pipeline from the bundled model, a folder or the hub, or a sentence why not."""

from __future__ import annotations

from typing import Any


def load(name: str, *, dtype: str | Any = "float32", device: str = "cpu") -> Any:
    """Load a diffusers pipeline. `name` is "embedded", a folder, or a hub id.

    Raises `ModelError` for an unknown model, a damaged folder, an offline hub, an absent device.
    """
    raise NotImplementedError
