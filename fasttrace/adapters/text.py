"""Text encoders: found by structure, their sites, and a prompt's way to the denoiser."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fasttrace.adapters.spans import Tokens, token_span, tokenize
from fasttrace.errors import ModelError
from fasttrace.types import Site, Span

KINDS = ("attn", "mlp", "hidden")


@dataclass(frozen=True)
class Text:
    """What the denoiser reads of one prompt; the unconditional half is None without guidance.

    cond [1, n, D]; of Kandinsky 2.2 the image embedding [1, E], all that its decoder reads. pooled
    [1, P]: SDXL's, and Kandinsky 2.1's. image [1, E]: Kandinsky 2.1's beside its text.
    """

    cond: Tensor
    pooled: Tensor | None = None
    uncond: Tensor | None = None
    uncond_pooled: Tensor | None = None
    image: Tensor | None = None
    uncond_image: Tensor | None = None
    origin: Any = None  # what a family needs to encode other prompts for the same (prompt, seed)

    @property
    def alone(self) -> Text:
        """Without its unconditional half."""
        return replace(self, uncond=None, uncond_pooled=None, uncond_image=None)

    def rows(
        self, cond: Tensor, pooled: Tensor | None = None, image: Tensor | None = None
    ) -> list[Text]:
        """A text for each row of other prompts' conditional halves."""
        return [
            replace(self, cond=cond[i : i + 1], pooled=_row(pooled, i), image=_row(image, i))
            for i in range(len(cond))
        ]


@dataclass(frozen=True)
class Layout:
    """Where the parts of a text encoder lie, as paths from its core, or from one of its layers.

    attn, mlp: the modules whose outputs are added to the stream. causal: whether a token sees
    earlier ones alone.
    """

    words: str
    layers: str
    attn: str
    mlp: str
    causal: bool


CLIP = Layout("embeddings.token_embedding", "encoder.layers", "self_attn", "mlp", causal=True)
ROBERTA = Layout(
    "embeddings.word_embeddings",
    "encoder.layer",
    "attention.output.dense",
    "output.dense",
    causal=False,
)


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder with its tokenizer.

    penultimate: the denoiser reads the layer before the last (SDXL). to_end: what stands behind the
    end token is masked where it is read (Kandinsky's prior). window: of the text, where it isn't
    the tokenizer's own.
    """

    name: str  # "text_encoder", "text_encoder_2", "prior_text_encoder"
    module: Any
    tokenizer: Any
    pipe: Any
    penultimate: bool = False
    to_end: bool = False
    fixed_window: int | None = None

    @property
    def core(self) -> Any:
        """The module with the embeddings and the layers.

        Under `.text_model` in transformers before 5.6, and still for encoders with a projection.
        """
        return text_core(self.module)

    @property
    def layout(self) -> Layout:
        return CLIP if hasattr(self.core.encoder, "layers") else ROBERTA

    @property
    def causal(self) -> bool:
        """Whether a token sees earlier ones alone."""
        return self.layout.causal

    @property
    def layers(self) -> Any:
        return self.core.get_submodule(self.layout.layers)

    @property
    def width(self) -> int:
        """D, of the embeddings and of every layer."""
        return int(self.module.config.hidden_size)

    @property
    def window(self) -> int:
        """Padded length of a text."""
        return self.fixed_window or int(self.tokenizer.model_max_length)

    @property
    def word_embedding(self) -> nn.Module:
        module: nn.Module = self.core.get_submodule(self.layout.words)
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
        return tokenize(self.tokenizer, self.convert(prompt), self.window)

    def span(self, prompt: str, subject: str, occurrence: int = 0) -> Span:
        prompt, subject = self.convert(prompt), self.convert(subject)
        return token_span(self.tokenizer, prompt, subject, occurrence, self.window)

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
            self.window,
            self.width,
            penultimate=self.penultimate,
            pooled=self.has_pooled,
        )

    def modules(self) -> dict[str, nn.Module]:
        """The module behind each site name."""
        found: dict[str, nn.Module] = {}
        for i, layer in enumerate(self.layers):
            found[f"{self.name}.layers.{i}.self_attn"] = layer.get_submodule(self.layout.attn)
            found[f"{self.name}.layers.{i}.mlp"] = layer.get_submodule(self.layout.mlp)
            found[f"{self.name}.layers.{i}"] = layer
        return found

    def reached(self, site: Site, token: int, eos: int) -> bool:
        """Whether the activation at one token position can reach the denoiser.

        The pooled vector is read at the end token alone, so a last layer that acts only through it
        acts only there.
        """
        if self.to_end and token > eos:
            return False
        return site.reaches == "denoiser" or (site.reaches == "pooled" and token == eos)


def text_core(module: nn.Module) -> Any:
    """The part of a text model that owns the layers, of CLIP or of Kandinsky 2.1's XLM-Roberta.

    Raises `ModelError` for other layouts.
    """
    inner = (getattr(module, name, None) for name in ("text_model", "transformer"))
    for part in (module, *inner):
        layers = {"layers", "layer"} & set(dir(getattr(part, "encoder", None)))
        if hasattr(part, "embeddings") and layers:
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
    """The text encoders of a Stable Diffusion pipeline in the order their outputs are joined."""
    names = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")]
    present = [(e, t) for e, t in names if getattr(pipe, e, None) is not None]
    joined = hasattr(pipe, "text_encoder_2")
    return [
        TextEncoder(e, getattr(pipe, e), getattr(pipe, t), pipe, penultimate=joined)
        for e, t in present
    ]


def check_places(encoder: TextEncoder) -> None:
    """Raise `ModelError` for a tokenizer that gives more tokens than the encoder has places for."""
    places = encoder.core.embeddings
    count = (
        places.position_embedding.num_embeddings
        if encoder.layout is CLIP
        # The first places are for padding.
        else places.position_embeddings.num_embeddings - places.padding_idx - 1
    )
    if encoder.window > count:
        raise ModelError(
            f"The tokenizer of {encoder.name} gives up to {encoder.window} tokens, but the encoder "
            f"has places for {count}: the tokenizer's files are missing or belong to another model."
        )


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


def _row(tensor: Tensor | None, i: int) -> Tensor | None:
    return None if tensor is None else tensor[i : i + 1]
