"""Pictures beside the rows: PNG files named by content hashes, never by a prompt."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fasttrace.errors import StoreError
from fasttrace.store.disk import ROWS, Writing, write_atomic

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def picture_path(folder: Path, name: str) -> Path:
    """The file of a picture. Raises `StoreError` for a name that could lead out of the folder."""
    if not _SAFE.fullmatch(name):
        raise StoreError(
            f"{name!r} is no picture name: letters, digits, '-' and '_' are expected. "
            "The row that names it was not written by fasttrace."
        )
    return folder / f"{name}.png"


def to_image(picture: Any) -> Image.Image:
    """An 8-bit image of a float picture [3,H,W] in [0,1] (torch on the CPU, or numpy)."""
    array = np.asarray(picture, dtype=np.float32)
    if array.ndim != 3 or array.shape[0] not in (1, 3):
        raise StoreError(f"a picture has the shape {array.shape}; [3, height, width] is expected.")
    pixels = np.rint(np.clip(np.nan_to_num(array), 0.0, 1.0) * 255.0).astype(np.uint8)
    return Image.fromarray(pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0))


def save_picture(folder: Path, name: str, picture: Any, writing: Writing = ROWS) -> Path:
    """Write a picture unless it is there already; whole or not at all. Raises `StoreError`."""
    path = picture_path(folder, name)
    if not path.exists():
        sink = io.BytesIO()
        to_image(picture).save(sink, format="PNG", compress_level=1)
        write_atomic(path, sink.getvalue(), writing)
    return path


def open_picture(folder: Path, name: str, damaged: dict[str, str]) -> Image.Image | None:
    """The picture, or None where the file is missing or damaged: a report shows the rest.

    What is wrong with a damaged one goes into `damaged`: a caller can name many in one line.
    """
    path = picture_path(folder, name)
    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        damaged[name] = f"{path} can't be read as a picture ({error})"
        return None
