"""Stable Diffusion 1.x, 2.x and XL: one text embedding, with XL a pooled vector beside it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrace.adapters.readiness import check_stable
from fasttrace.adapters.text import Text, TextEncoder, encode_cond, encode_uncond, find_encoders
from fasttrace.errors import ModelError
from fasttrace.types import Sampling


class Stable:
    """The `Family` of Stable Diffusion."""

    decoder = "vae"
    swaps_text = True
    loads_lora = True
    seeded = False

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._upcast: tuple[Any, Any] | None = None

    @property
    def scale(self) -> int:
        return int(self.pipe.vae_scale_factor)

    @property
    def unit(self) -> int:
        return self.scale

    @property
    def reads_pooled(self) -> bool:
        return self.two_texts

    @property
    def two_texts(self) -> bool:
        """SDXL: pooled text and picture sizes enter beside the text embedding."""
        return getattr(self._config, "addition_embed_type", None) == "text_time"

    def encoders(self) -> list[TextEncoder]:
        return find_encoders(self.pipe)

    def check(self) -> None:
        check_stable(self.pipe)

    def latent_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.pipe.text_encoder.dtype
        return dtype

    def skip(self, generator: torch.Generator, rows: int) -> None:
        """Nothing is drawn before."""

    def ready(self, scheduler: Any) -> None:
        if self.two_texts and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

    def text(self, prompt: str, negative_prompt: str, guided: bool, start: Any) -> Text:
        cond, pooled = encode_cond(self.pipe, prompt, self._device)
        if not guided:
            return Text(cond, pooled)
        uncond, uncond_pooled = encode_uncond(self.pipe, negative_prompt, self._device)
        return Text(cond, pooled, uncond, uncond_pooled)

    def encode(self, prompts: Sequence[str], like: Text) -> list[Text]:
        return like.rows(*encode_cond(self.pipe, list(prompts), self._device))

    def read(self, prompt: str) -> None:
        encode_cond(self.pipe, prompt, self._device)

    def conditioning(self, text: Text, sampling: Sampling, copies: int) -> dict[str, Any]:
        halves = [h for h in (text.uncond, text.cond) if h is not None]
        inputs: dict[str, Any] = {
            "encoder_hidden_states": torch.cat([h for h in halves for _ in range(copies)]),
            "return_dict": False,
        }
        rows = len(halves) * copies
        if self.two_texts:
            if text.pooled is None:
                raise ModelError("The UNet wants a pooled text vector, but the pipeline gave none.")
            size = (sampling.height, sampling.width)
            times = self.pipe._get_add_time_ids(
                size,
                (0, 0),
                size,
                dtype=text.cond.dtype,
                text_encoder_projection_dim=text.pooled.shape[-1],
            )
            pooled = [h for h in (text.uncond_pooled, text.pooled) if h is not None]
            inputs["added_cond_kwargs"] = {
                "text_embeds": torch.cat([h for h in pooled for _ in range(copies)]),
                "time_ids": times.to(self._device).repeat(rows, 1),
            }
        if getattr(self._config, "time_cond_proj_dim", None) is not None:
            scale = torch.tensor(sampling.guidance - 1).repeat(rows)
            embedding = self.pipe.get_guidance_scale_embedding(
                scale, embedding_dim=self._config.time_cond_proj_dim
            )
            inputs["timestep_cond"] = embedding.to(device=self._device, dtype=text.cond.dtype)
        return inputs

    def kept_channels(self) -> int | None:
        return None

    def guide(self, prediction: Tensor, guidance: float | None) -> Tensor:
        if guidance is None:
            return prediction
        uncond, cond = prediction.chunk(2)
        return uncond + guidance * (cond - uncond)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        config = vae.config
        if vae.dtype == torch.float16 and getattr(config, "force_upcast", False) and self.two_texts:
            vae = self._float_vae
            latents = latents.float()
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if self.two_texts and mean is not None and std is not None:
            column = (1, len(mean), 1, 1)
            latents = latents * latents.new_tensor(std).view(column) / config.scaling_factor
            latents = latents + latents.new_tensor(mean).view(column)
        else:
            latents = latents / config.scaling_factor
        pictures: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return pictures

    def sampling_facts(self) -> dict[str, Any]:
        return {}

    @property
    def _float_vae(self) -> Any:
        """SDXL's VAE overflows in half precision; a copy, since the pipeline's own has to stay.

        Made anew once a weight has changed.
        """
        vae = self.pipe.vae
        state = [(id(t), None if t.is_inference() else t._version) for t in vae.parameters()]
        if self._upcast is None or self._upcast[0] != state:
            copied = copy.deepcopy(vae).float()
            copied.__dict__.pop("decode", None)  # if compiled, it is the half-precision VAE's
            self._upcast = state, copied
        return self._upcast[1]

    @property
    def _config(self) -> Any:
        return self.pipe.unet.config

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.pipe.unet.parameters()).device
        return device
