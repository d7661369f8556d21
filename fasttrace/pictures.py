"""Pictures as others want them: tensors, NumPy arrays, PIL images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fasttrace.plan.options import parse_choice

OUTPUTS = ("pt", "np", "pil")


def as_output(picture: Tensor, output_type: str) -> Any:
    """One picture [3, H, W] in [0, 1], as diffusers' `output_type` names it.

    "pt": the tensor. "np": [H, W, 3] float32. "pil": a PIL image of 8 bits.
    """
    parse_choice(output_type, OUTPUTS, "output_type")
    if output_type == "pt":
        return picture
    if output_type == "np":
        return picture.detach().cpu().float().permute(1, 2, 0).numpy()
    from fasttrace.store.pictures import to_image

    return to_image(picture.detach().cpu().float())


def outputs(pictures: Mapping[str, Tensor], output_type: str) -> dict[str, Any]:
    """The same of several, by name."""
    return {name: as_output(picture, output_type) for name, picture in pictures.items()}
