"""Kandinsky 2.1 and 2.2: a prior turns the text into an image embedding, which a decoder draws.

The prior is a denoiser of its own, run anew for every text from the same noise: the pipeline's
generator gives it first, the decoder's latent comes after. In 2.1 the decoder also reads the text,
through a multilingual encoder.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fasttrace.adapters.fingerprint import digest
from fasttrace.adapters.readiness import check_kandinsky
from fasttrace.adapters.text import Text, TextEncoder
from fasttrace.errors import ModelError
from fasttrace.types import Sampling

WINDOW = 77  # tokens that the pipeline gives its multilingual encoder
_LEARNED = ("learned", "learned_range")


@dataclass(frozen=True)
class Words:
    """What the prior reads of some prompts: pooled [R, P], hidden [R, n, D], mask [R, n]."""

    pooled: Tensor
    hidden: Tensor
    mask: Tensor

    def repeated(self, rows: int) -> Words:
        return Words(*(t.expand(rows, *t.shape[1:]) for t in (self.pooled, self.hidden, self.mask)))


@dataclass(frozen=True)
class Origin:
    """What all priors of one (prompt, seed) share.

    start: `Start` with the generator's state before the prior. uncond: the words of its own
    guidance. negative: those of a negative prompt, which the pipeline runs as a second row.
    """

    start: Any
    uncond: Words | None
    negative: Words | None


class Kandinsky:
    """The `Family` of the combined pipelines."""

    decoder = "movq"
    reads_pooled = True
    swaps_text = False
    loads_lora = False
    seeded = True

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @property
    def scale(self) -> int:
        return int(2 ** (len(self.pipe.movq.config.block_out_channels) - 1))

    @property
    def unit(self) -> int:
        return self.scale**2  # the pipelines round up to it

    @property
    def reads_text(self) -> bool:
        """2.1: the decoder has a text encoder of its own."""
        return getattr(self.pipe, "text_encoder", None) is not None

    def encoders(self) -> list[TextEncoder]:
        pipe = self.pipe
        found = [
            TextEncoder(
                "prior_text_encoder",
                pipe.prior_text_encoder,
                pipe.prior_tokenizer,
                pipe,
                to_end=True,
            )
        ]
        if self.reads_text:
            found.append(
                TextEncoder(
                    "text_encoder", pipe.text_encoder, pipe.tokenizer, pipe, fixed_window=WINDOW
                )
            )
        return found

    def check(self) -> None:
        check_kandinsky(self.pipe)

    def latent_dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.pipe.unet.parameters()).dtype
        return dtype

    def skip(self, generator: torch.Generator, rows: int) -> None:
        """The prior's first latent, and what its scheduler draws."""
        shape = (rows, int(self.pipe.prior_prior.config.embedding_dim))
        zero = torch.zeros(shape, dtype=self._prior_dtype, device=self._device)
        randn_tensor(shape, generator=generator, device=self._device, dtype=self._prior_dtype)
        scheduler = self._prior_scheduler()
        for t, options in _steps(scheduler):
            scheduler.step(zero, t, zero, generator=generator, **options)

    def ready(self, scheduler: Any) -> None:
        """Nothing is set."""

    # ---- text

    def text(self, prompt: str, negative_prompt: str, guided: bool, start: Any) -> Text:
        words = self._words([prompt])
        own = self._prior_guidance > 1
        negative = self._words([negative_prompt]) if negative_prompt else None
        uncond = (negative or self._words([""])) if own else None
        origin = Origin(start, uncond, negative)
        image, unwanted = self._image(words, origin)
        if unwanted is None and guided:
            unwanted = self._no_picture()
        unwanted = unwanted if guided else None
        if not self.reads_text:
            return Text(image, uncond=unwanted, origin=origin)
        cond, pooled = self._decoder_words([prompt])
        # The pipeline gives the negative prompt to its prior alone.
        uncond_text, uncond_pooled = self._decoder_words([""]) if guided else (None, None)
        return Text(cond, pooled, uncond_text, uncond_pooled, image, unwanted, origin)

    def encode(self, prompts: Sequence[str], like: Text) -> list[Text]:
        words = self._words(prompts)
        cond, pooled = self._decoder_words(prompts) if self.reads_text else (None, None)
        image, _ = self._image(words, like.origin)
        if cond is None:
            return like.rows(image)
        return like.rows(cond, pooled, image)

    def read(self, prompt: str) -> None:
        self._words([prompt])
        if self.reads_text:
            self._decoder_words([prompt])

    def _words(self, prompts: Sequence[str]) -> Words:
        tokenizer, encoder = self.pipe.prior_tokenizer, self.pipe.prior_text_encoder
        given = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        out = encoder(given.input_ids.to(self._device))
        mask = given.attention_mask.bool().to(self._device)
        return Words(out.text_embeds, out.last_hidden_state, mask)

    def _decoder_words(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """2.1's own: hidden [R, 77, D] and pooled [R, P]."""
        given = self.pipe.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=WINDOW,
            return_attention_mask=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        ids, mask = given.input_ids.to(self._device), given.attention_mask.to(self._device)
        pooled, hidden = self.pipe.text_encoder(input_ids=ids, attention_mask=mask)
        return hidden, pooled

    # ---- the prior

    def _image(self, words: Words, origin: Origin) -> tuple[Tensor, Tensor | None]:
        """Image embeddings [R, E] of prompts, and with a negative prompt its own [1, E]."""
        rows = len(words.pooled)
        if origin.start is None:
            raise ModelError("A prior's image embedding needs a seed: give model.text a start.")
        if origin.negative is None:
            generators = [origin.start.first_generator() for _ in range(rows)]
            return self._denoise(words, origin.uncond, generators), None
        # The pipeline draws for prompt and negative prompt together.
        found = []
        for i in range(rows):
            both = Words(
                *(
                    torch.cat([one[i : i + 1], other])
                    for one, other in (
                        (words.pooled, origin.negative.pooled),
                        (words.hidden, origin.negative.hidden),
                        (words.mask, origin.negative.mask),
                    )
                )
            )
            found.append(self._denoise(both, origin.uncond, origin.start.first_generator()))
        return torch.cat([both[:1] for both in found]), found[0][1:]

    def _denoise(self, words: Words, uncond: Words | None, generator: Any) -> Tensor:
        """The prior's sampling loop: [R, E]."""
        prior, guidance = self.pipe.prior_prior, self._prior_guidance
        rows = len(words.pooled)
        if uncond is not None:
            free = uncond.repeated(rows)
            words = Words(
                torch.cat([free.pooled, words.pooled]),
                torch.cat([free.hidden, words.hidden]),
                torch.cat([free.mask, words.mask]),
            )
        scheduler = self._prior_scheduler()
        shape = (rows, int(prior.config.embedding_dim))
        latents = randn_tensor(
            shape, generator=generator, device=self._device, dtype=words.pooled.dtype
        )
        latents = latents * scheduler.init_noise_sigma
        for t, options in _steps(scheduler):
            batch = latents if uncond is None else torch.cat([latents] * 2)
            predicted = prior(
                batch,
                timestep=t,
                proj_embedding=words.pooled,
                encoder_hidden_states=words.hidden,
                attention_mask=words.mask,
            ).predicted_image_embedding
            if uncond is not None:
                low, high = predicted.chunk(2)
                predicted = low + guidance * (high - low)
            latents = scheduler.step(predicted, t, latents, generator=generator, **options)[0]
        found: Tensor = prior.post_process_latents(latents)
        return found

    def _no_picture(self) -> Tensor:
        """What the pipelines take for the unconditional image: a black picture's embedding."""
        encoder = self.pipe.prior_image_encoder
        side = encoder.config.image_size
        black = torch.zeros(1, 3, side, side, dtype=encoder.dtype, device=self._device)
        found: Tensor = encoder(black).image_embeds
        return found

    def _prior_scheduler(self) -> Any:
        scheduler = copy.deepcopy(self.pipe.prior_scheduler)
        scheduler.set_timesteps(self._prior_steps, device=self._device)
        return scheduler

    @property
    def _prior_steps(self) -> int:
        return int(self._default("prior_num_inference_steps"))

    @property
    def _prior_guidance(self) -> float:
        return float(self._default("prior_guidance_scale"))

    @property
    def _prior_dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.pipe.prior_text_encoder.parameters()).dtype
        return dtype

    def _default(self, name: str) -> Any:
        return inspect.signature(type(self.pipe).__call__).parameters[name].default

    # ---- the decoder

    def conditioning(self, text: Text, sampling: Sampling, copies: int) -> dict[str, Any]:
        def rows(uncond: Tensor | None, cond: Tensor | None) -> Tensor:
            halves = [h for h in (uncond, cond) if h is not None]
            dtype = self.latent_dtype()
            return torch.cat([h for h in halves for _ in range(copies)]).to(dtype)

        if not self.reads_text:
            added = {"image_embeds": rows(text.uncond, text.cond)}
            return {
                "encoder_hidden_states": None,
                "added_cond_kwargs": added,
                "return_dict": False,
            }
        return {
            "encoder_hidden_states": rows(text.uncond, text.cond),
            "added_cond_kwargs": {
                "text_embeds": rows(text.uncond_pooled, text.pooled),
                "image_embeds": rows(text.uncond_image, text.image),
            },
            "return_dict": False,
        }

    def kept_channels(self) -> int | None:
        return None if self._learned else int(self.pipe.unet.config.in_channels)

    def guide(self, prediction: Tensor, guidance: float | None) -> Tensor:
        """Guidance is for the noise alone; the variance is the conditional rows'."""
        channels = int(self.pipe.unet.config.in_channels)
        noise, variance = prediction[:, :channels], prediction[:, channels:]
        if guidance is not None:
            uncond, cond = noise.chunk(2)
            noise = uncond + guidance * (cond - uncond)
            variance = variance.chunk(2)[1]
        return torch.cat([noise, variance], 1) if self._learned else noise

    @property
    def _learned(self) -> bool:
        return getattr(self.pipe.scheduler.config, "variance_type", None) in _LEARNED

    def decode(self, latents: Tensor) -> Tensor:
        movq = self.pipe.movq
        latents = latents.to(next(movq.parameters()).dtype)
        found: Tensor = movq.decode(latents, force_not_quantize=True, return_dict=False)[0]
        return found

    def sampling_facts(self) -> dict[str, Any]:
        scheduler = self.pipe.prior_scheduler
        config = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
        return {
            "prior": {
                "steps": self._prior_steps,
                "guidance": self._prior_guidance,
                "scheduler": type(scheduler).__name__,
                "scheduler_config": digest(config)[:12],
            }
        }

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.pipe.unet.parameters()).device
        return device


def _steps(scheduler: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """Timesteps, each with the one after it for schedulers that want to be told."""
    wants = "prev_timestep" in inspect.signature(scheduler.step).parameters
    times = list(scheduler.timesteps)
    after: list[Any] = [*times[1:], None]
    pairs = zip(times, after, strict=True)
    return [(t, {"prev_timestep": later} if wants else {}) for t, later in pairs]
