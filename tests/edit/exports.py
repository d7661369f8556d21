"""Edits to export, and pictures to compare what comes back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttrace import Editor
from fasttrace.edit.edit import Edit

PAIRS = [("big dog", "cat")]
MID = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
FEW: dict[str, Any] = {"tokens": "last", "templates": ["{}", "a {}"]}  # rank 2: a LoRA is smaller
CALLS: dict[str, dict[str, Any]] = {
    "diffquickfix": {},
    "mlp": {"method": "mlp"},
    "uce": {"method": "uce"},
    "time": {"method": "time"},
    "locoedit": {"site": MID},
    "few": FEW,
    "few uce": {"method": "uce", **FEW},
}
LORAS = {"peft": "pytorch_lora_weights.safetensors", "kohya": "kohya.safetensors"}


def latents_of(pipe: Any) -> Tensor:
    found: Tensor = pipe(
        "a photo of a big dog",
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    return found


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def assert_same_pictures(found: Tensor, expected: Tensor, plain: Tensor) -> None:
    assert rms(expected - plain) > 1e-3 * rms(plain)
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, rms(expected))


def everywhere(pipe: Any, pairs: Any = PAIRS, **options: Any) -> Edit:
    """Text encoders, and the UNet on top."""
    editor = Editor(pipe)
    return editor.edit(pairs, method="uce", after=editor.edit(pairs, **options), **options)


def same_changes(one: Edit, other: Edit) -> None:
    """To what float32 factors hold."""
    assert list(one.changes) == list(other.changes)
    for name, change in other.changes.items():
        lost = float((one.changes[name].dense - change.dense).norm() / change.dense.norm())
        assert lost <= 4e-7
