"""Text encoders: found by structure, their sites, and a prompt's way to the denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttrace.adapters.spans import Tokens, token_span, tokenize
from fasttrace.errors import ModelError
from fasttrace.types import Site, Span

KINDS = ("attn", "mlp", "hidden")


@dataclass(frozen=True)
class Text:
    """What the denoiser reads of one prompt; the unconditional half is None without guidance."""

    cond: Tensor  # [1, n, D]
    pooled: Tensor | None = None  # [1, P], SDXL only
    uncond: Tensor | None = None
    uncond_pooled: Tensor | None = None


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder with its tokenizer."""

    name: str  # "text_encoder" or "text_encoder_2"
    module: Any
    tokenizer: Any
    pipe: Any
    penultimate: bool  # the denoiser reads the layer before the last (SDXL)

    @property
    def core(self) -> Any:
        """The module with `embeddings` and `encoder.layers`.

        Under `.text_model` in transformers before 5.6, and still for encoders with a projection.
        """
        return text_core(self.module)

    @property
    def layers(self) -> Any:
        return self.core.encoder.layers

    @property
    def width(self) -> int:
        """D, of the embeddings and of every layer."""
        return int(self.module.config.hidden_size)

    @property
    def word_embedding(self) -> nn.Module:
        module: nn.Module = self.core.embeddings.token_embedding
        return module

    @property
    def has_pooled(self) -> bool:
        """Whether the pooled vector is read by the denoiser too (the projected encoder of SDXL)."""
        return self.penultimate and hasattr(self.module, "text_projection")

    def convert(self, prompt: str) -> str:
        """The prompt with textual-inversion tokens written out, as the pipeline does."""
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        return prompt if convert is None else str(convert(prompt, self.tokenizer))

    def tokens(self, prompt: str) -> Tokens:
        return tokenize(self.tokenizer, self.convert(prompt))

    def span(self, prompt: str, subject: str, occurrence: int = 0) -> Span:
        return token_span(self.tokenizer, self.convert(prompt), self.convert(subject), occurrence)

    def word_rows(self, prompt: str, span: Span) -> Tensor:
        """Embedding rows [span, D] of the span's tokens, float32."""
        ids = torch.tensor(self.tokens(prompt).ids[span.start : span.stop])
        weight: Any = self.word_embedding.weight
        rows: Tensor = weight.detach()[ids.to(weight.device)].float()
        return rows

    def sites(self) -> list[Site]:
        return text_sites(
            self.name,
            len(self.layers),
            int(self.tokenizer.model_max_length),
            self.width,
            penultimate=self.penultimate,
            pooled=self.has_pooled,
        )

    def modules(self) -> dict[str, nn.Module]:
        """The module behind each site name."""
        found: dict[str, nn.Module] = {}
        for i, layer in enumerate(self.layers):
            found[f"{self.name}.layers.{i}.self_attn"] = layer.self_attn
            found[f"{self.name}.layers.{i}.mlp"] = layer.mlp
            found[f"{self.name}.layers.{i}"] = layer
        return found

    def reached(self, site: Site, token: int, eos: int) -> bool:
        """Whether the activation at one token position can reach the denoiser.

        The pooled vector is read at the end token alone, so a last layer that acts only through it
        acts only there.
        """
        return site.reaches == "denoiser" or (site.reaches == "pooled" and token == eos)


def text_core(module: nn.Module) -> Any:
    """The part of a CLIP text model that owns the layers. Raises `ModelError` for other layouts."""
    for part in (module, getattr(module, "text_model", None)):
        if hasattr(part, "embeddings") and hasattr(getattr(part, "encoder", None), "layers"):
            return part
    raise ModelError(
        f"The text encoder {type(module).__name__} has no CLIP layout (embeddings, encoder.layers)."
    )


def text_sites(
    name: str, layers: int, window: int, width: int, *, penultimate: bool, pooled: bool
) -> list[Site]:
    """Every (layer, kind) of an encoder in execution order; shape [window, width].

    attn and mlp are the modules' outputs before the residual, hidden the layer's output after both
    residuals and before the final norm.
    """
    found: list[Site] = []
    for layer in range(layers):
        last = penultimate and layer == layers - 1
        for kind, suffix in zip(KINDS, (".self_attn", ".mlp", ""), strict=True):
            found.append(
                Site(
                    name=f"{name}.layers.{layer}{suffix}",
                    kind=kind,
                    component=name,
                    index=len(found),
                    shape=(window, width),
                    reaches="denoiser" if not last else "pooled" if pooled else "nothing",
                )
            )
    return found


def find_encoders(pipe: Any) -> list[TextEncoder]:
    """The pipeline's text encoders in the order their outputs are joined."""
    names = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")]
    present = [(e, t) for e, t in names if getattr(pipe, e, None) is not None]
    joined = hasattr(pipe, "text_encoder_2")
    found = [
        TextEncoder(e, getattr(pipe, e), getattr(pipe, t), pipe, penultimate=joined)
        for e, t in present
    ]
    for encoder in found:
        places = text_core(encoder.module).embeddings.position_embedding.num_embeddings
        window = int(encoder.tokenizer.model_max_length)
        if window > places:
            raise ModelError(
                f"The tokenizer of {encoder.name} gives up to {window} tokens, but the encoder has "
                f"places for {places}: the tokenizer's files are missing or belong to another "
                "model."
            )
    return found


def encode_cond(
    pipe: Any, prompt: str | list[str], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The prompt's embedding [1, n, D] and, for SDXL, its pooled vector [1, P]; a row a prompt.

    The pipeline's own `encode_prompt`, without the negative prompt: hooks on the encoders see these
    prompts alone.
    """
    out = pipe.encode_prompt(
        prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return out[0], (out[2] if len(out) == 4 else None)


def encode_uncond(
    pipe: Any, negative_prompt: str, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The unconditional embedding [1, n, D] and pooled vector; "" means none was given."""
    out = pipe.encode_prompt(
        "",
        device=device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=negative_prompt or None,
    )
    return out[1], (out[3] if len(out) == 4 else None)
