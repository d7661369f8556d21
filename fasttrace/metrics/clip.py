"""CLIP scores: cosines of a picture's features, times 100 (Hessel et al., 2021, unclipped)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrace.adapters.fingerprint import module_digest
from fasttrace.adapters.load import is_hub_id, json_object, loading_error, local_only
from fasttrace.errors import ModelError
from fasttrace.types import MetricContext

# OpenAI's training statistics, used where the model's folder doesn't bring its own.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipScorer:
    """A `CLIPModel` with its tokenizer; differentiable in the pictures.

    `source` is a folder or a hub id. Raises `ModelError` where it can't be loaded.
    """

    def __init__(self, source: str | Path, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPModel

        place = Path(source) if Path(source).is_dir() else str(source)
        if isinstance(place, str) and not is_hub_id(place):
            raise ModelError(
                f"There is no CLIP model '{place}': expected a folder or a hub id 'owner/model'."
            )
        try:
            here: Any = {"local_files_only": local_only(place)}
            read: Any = CLIPModel.from_pretrained
            self.model: Any = read(str(source), dtype=torch.float32, **here)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(source), **here)
        except Exception as error:
            raise loading_error(str(source), place, error) from error
        self.model.to(device).eval().requires_grad_(False)
        self.mean, self.std = _statistics(Path(source), device)
        self.size: int = self.model.config.vision_config.image_size
        self.fingerprint = module_digest(self.model)
        self._texts: dict[str, Tensor] = {}

    def prepare(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1]: shorter side resized, centre cropped, normalised."""
        height, width = pictures.shape[-2:]
        if (height, width) != (self.size, self.size):
            scale = self.size / min(height, width)
            sides = [max(self.size, round(height * scale)), max(self.size, round(width * scale))]
            pictures = F.interpolate(pictures, sides, mode="bicubic", antialias=True).clamp(0, 1)
            top, left = (sides[0] - self.size) // 2, (sides[1] - self.size) // 2
            pictures = pictures[..., top : top + self.size, left : left + self.size]
        return (pictures - self.mean) / self.std

    def picture_features(self, pictures: Tensor) -> Tensor:
        """Unit vectors [B, P]."""
        pixels = self.prepare(pictures.to(self.mean))
        return F.normalize(_features(self.model.get_image_features(pixel_values=pixels)), dim=-1)

    def text_features(self, text: str) -> Tensor:
        """Unit vector [1, P]; texts longer than the scorer's window are cut."""
        if text not in self._texts:
            given = self.tokenizer(
                [text],
                padding="max_length",
                max_length=self.model.config.text_config.max_position_embeddings,
                truncation=True,
                return_tensors="pt",
            )
            with torch.no_grad():
                out = self.model.get_text_features(
                    input_ids=given.input_ids.to(self.mean.device),
                    attention_mask=given.attention_mask.to(self.mean.device),
                )
            self._texts[text] = F.normalize(_features(out), dim=-1)
        return self._texts[text]

    def clip_score(self, pictures: Tensor, context: MetricContext) -> Tensor:
        """Cosine x 100 between picture and caption. [B]"""
        text = self.text_features(context.probe.prompt)
        return 100 * (self.picture_features(pictures) * text).sum(-1)

    def similarity(self, pictures: Tensor, context: MetricContext) -> Tensor:
        """Cosine x 100 between picture and the clean run's picture. [B]"""
        if context.clean_picture is None:
            raise ModelError("picture_similarity needs the clean run's picture, which is missing.")
        clean = self.picture_features(context.clean_picture)
        return 100 * (self.picture_features(pictures) * clean).sum(-1)


def _features(out: Any) -> Tensor:
    """transformers 5 returns a model output whose pooled part is already projected."""
    features: Tensor = out if isinstance(out, Tensor) else out.pooler_output
    return features


def _statistics(folder: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    file = folder / "preprocessor_config.json"
    given = json_object(file, file.name) if file.is_file() else {}
    mean, std = given.get("image_mean", _MEAN), given.get("image_std", _STD)
    return (
        torch.tensor(mean, device=device).view(1, 3, 1, 1),
        torch.tensor(std, device=device).view(1, 3, 1, 1),
    )
