"""Pictures as data URIs: thumbnails, and one sheet of all restored pictures of a pair."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

SHEET_COLUMNS = 14


def data_uri(image: Image.Image, side: int) -> str:
    """WebP of at most `side` pixels; small pictures are enlarged by the browser, not here."""
    small = image.convert("RGB")
    if max(small.size) > side:
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    lossless = max(small.size) <= 64
    small.save(sink, format="WEBP", quality=86, lossless=lossless, method=4)
    return "data:image/webp;base64," + base64.b64encode(sink.getvalue()).decode()


@dataclass(frozen=True)
class Sheet:
    """Many thumbnails in one image, row by row; `side` pixels each."""

    uri: str
    side: int
    columns: int
    count: int

    @property
    def rows(self) -> int:
        return -(-self.count // self.columns)


def sheet(images: Sequence[Image.Image | None], side: int) -> Sheet | None:
    """A contact sheet; missing pictures leave their place grey. None where all are missing."""
    present = [image for image in images if image is not None]
    if not present:
        return None
    side = min(side, max(max(image.size) for image in present))
    columns = min(SHEET_COLUMNS, len(images))
    canvas = Image.new("RGB", (columns * side, -(-len(images) // columns) * side), (128, 128, 128))
    for number, image in enumerate(images):
        if image is not None:
            place = (number % columns * side, number // columns * side)
            canvas.paste(image.resize((side, side), Image.Resampling.LANCZOS), place)
    return Sheet(data_uri(canvas, max(canvas.size)), side, columns, len(images))
