"""What kinds of pipeline differ in. `Model` asks its family; engines ask the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fasttrace.adapters.text import Text, TextEncoder
from fasttrace.types import Sampling


class Family(Protocol):
    """One pipeline's side of its kind.

    scale: pixels a latent's place has on a side. unit: what a picture's sides are multiples of.
    decoder: the component that makes pictures of latents. reads_pooled: whether a vector of the
    text enters every ResNet, beside the attention. swaps_text: whether a cross-attention can be
    given another prompt's text. loads_lora: whether diffusers loads LoRA files into the pipeline.
    seeded: whether what is read of a text depends on the seed.
    """

    @property
    def scale(self) -> int: ...
    @property
    def unit(self) -> int: ...
    @property
    def decoder(self) -> str: ...
    @property
    def reads_pooled(self) -> bool: ...
    @property
    def swaps_text(self) -> bool: ...
    @property
    def loads_lora(self) -> bool: ...
    @property
    def seeded(self) -> bool: ...

    def encoders(self) -> list[TextEncoder]:
        """In the order their outputs are joined."""
        ...

    def check(self) -> None:
        """Raise `ModelError` where the pipeline isn't whole or can't be traced."""
        ...

    def latent_dtype(self) -> torch.dtype:
        """In which the pipeline draws a first latent."""
        ...

    def skip(self, generator: torch.Generator, rows: int) -> None:
        """Draw what the pipeline draws before the first latent."""
        ...

    def ready(self, scheduler: Any) -> None:
        """What the pipeline does to a scheduler that has its timesteps."""
        ...

    def text(self, prompt: str, negative_prompt: str, guided: bool, start: Any) -> Text:
        """Everything the denoiser reads of a prompt. start: where its (prompt, seed) begins."""
        ...

    def encode(self, prompts: Sequence[str], like: Text) -> list[Text]:
        """Of other prompts, a text each: conditional halves anew, all else as in `like`.

        Hooks on the encoders see these prompts alone, in one pass, a row each.
        """
        ...

    def read(self, prompt: str) -> None:
        """Run the text encoders alone, for hooks on them."""
        ...

    def conditioning(self, text: Text, sampling: Sampling, copies: int) -> dict[str, Any]:
        """The UNet's keyword arguments; rows: all unconditional copies, then all conditional."""
        ...

    def kept_channels(self) -> int | None:
        """How many of the prediction's channels the scheduler reads; None is all of them."""
        ...

    def guide(self, prediction: Tensor, guidance: float | None) -> Tensor:
        """What the scheduler is given of a prediction [2 B, ...], or [B, ...] without guidance."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to pictures [B, 3, H, W] of about [-1, 1]."""
        ...

    def sampling_facts(self) -> dict[str, Any]:
        """What else decides a picture, beside `Sampling` and the scheduler: JSON."""
        ...
