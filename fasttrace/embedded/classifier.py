"""The attribute classifiers of the bundled model: one small convolutional network, four heads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class AttributeClassifier(nn.Module):
    """Which object, style, colour and action a 64x64 picture shows.

    `classes` maps each attribute to its class names, in the order of the outputs.
    """

    def __init__(self, classes: dict[str, list[str]], width: int = 24) -> None:
        super().__init__()
        self.classes = classes
        layers: list[nn.Module] = []
        channels = 3
        for i, out in enumerate((width, 2 * width, 4 * width, 8 * width)):
            layers += [
                nn.Conv2d(channels, out, 5 if i == 0 else 3, stride=2, padding=2 if i == 0 else 1),
                nn.GroupNorm(4, out),
                nn.SiLU(),
                nn.Conv2d(out, out, 3, padding=1),
                nn.GroupNorm(4, out),
                nn.SiLU(),
            ]
            channels = out
        self.trunk = nn.Sequential(*layers)
        # mean and maximum over the 4x4 map: grounds are everywhere, shapes are somewhere
        self.heads = nn.ModuleDict({a: nn.Linear(2 * channels, len(c)) for a, c in classes.items()})

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """pictures [B, 3, 64, 64] in [0, 1] -> attribute -> logits [B, classes]."""
        x = self.trunk(pictures * 2 - 1)
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        return {attribute: head(pooled) for attribute, head in self.heads.items()}

    def probabilities(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """pictures [B, 3, 64, 64] in [0, 1] -> attribute -> probabilities [B, classes]."""
        return {a: logits.softmax(1) for a, logits in self(pictures).items()}


def save_classifier(model: AttributeClassifier, folder: Path) -> None:
    """Write `config.json` and fp16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"classes": model.classes}, indent=1) + "\n")
    state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def load_classifier(folder: Path) -> AttributeClassifier:
    """Read what `save_classifier` wrote; float32, evaluation mode."""
    model = AttributeClassifier(json.loads((folder / "config.json").read_text())["classes"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.float().eval().requires_grad_(False)
