"""Destroying the subject: noise on its word embeddings or encodings, or another word in its place.

Meng et al. (2022) corrupt a subject's embeddings with sigma = 3 x the embeddings' spread over the
subjects of the data set; Basu et al. (2024) follow them. The spread here is the standard deviation
over all entries of the rows used as subject tokens in the probes, one number per encoder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fasttrace.adapters.hooks import rewriting
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.spans import character_span
from fasttrace.adapters.text import Text, TextEncoder, encode_cond
from fasttrace.errors import UsageError
from fasttrace.types import Corruption, Probe, Span

POOLED = "pooled"


def resolve(model: Model, probes: Sequence[Probe], corruption: Corruption) -> Corruption:
    """The corruption with its sigmas as numbers (one, or one per encoder and the pooled vector).

    Raises `UsageError` for a sigma or scale that is not finite or below zero, for a missing
    replacement, or where the subjects' embeddings are not finite.
    """
    if corruption.kind == "replace":
        if not (corruption.replacement or "").strip():
            raise UsageError("Corruption 'replace' needs a replacement, the words to put in place.")
        return corruption
    if corruption.replacement is not None:
        raise UsageError(
            f"Corruption '{corruption.kind}' takes no replacement; use kind 'replace'."
        )
    given = corruption.sigma
    numbers = given if isinstance(given, tuple) else (corruption.scale if given is None else given,)
    for value in numbers:
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise UsageError(
                f"The noise's sigma is {value!r}; it has to be finite and not negative."
            )
    if given is not None:
        wanted = len(model.encoders) + (corruption.kind == "output_noise" and model.two_texts)
        if isinstance(given, tuple) and len(given) != wanted:
            raise UsageError(
                f"{len(given)} sigmas were given; expected one number for all, or {wanted}: one "
                "for each text encoder, and with 'output_noise' one for the pooled vector."
            )
        return corruption
    if corruption.kind == "embedding_noise":
        rows = [
            [e.word_rows(p.prompt, e.span(p.prompt, p.subject, p.occurrence)) for p in probes]
            for e in model.encoders
        ]
    else:
        rows = _encoded_rows(model, probes)
    sigmas = tuple(corruption.scale * _spread(group) for group in rows)
    for sigma in sigmas:
        if not math.isfinite(sigma):
            raise UsageError(
                f"The noise's sigma came out as {sigma}: the subject's embeddings are not finite."
            )
    return replace(corruption, sigma=sigmas[0] if len(sigmas) == 1 else sigmas)


def corrupt_text(model: Model, probe: Probe, corruption: Corruption, clean: Text) -> Text:
    """The corrupt conditional text; the unconditional half is the clean one's, untouched."""
    if corruption.kind == "output_noise":
        cond, pooled = _noisy_output(model, probe, corruption, clean)
        return replace(clean, cond=cond, pooled=pooled)
    with ExitStack() as hooks:
        enter_corruption(hooks, model, probe, corruption)
        [corrupt] = model.encode([corrupt_prompt(probe, corruption)], clean)
    return corrupt


def corrupt_prompt(probe: Probe, corruption: Corruption) -> str:
    """The prompt that a corrupt run encodes: the caption, unless words are replaced."""
    if corruption.kind != "replace":
        return probe.prompt
    start, stop = character_span(probe.prompt, probe.subject, probe.occurrence)
    return probe.prompt[:start] + str(corruption.replacement) + probe.prompt[stop:]


def enter_corruption(hooks: ExitStack, model: Model, probe: Probe, corruption: Corruption) -> None:
    """Add noise to the subject's word embeddings of every encoder for as long as `hooks` last."""
    if corruption.kind != "embedding_noise":
        return
    for i, encoder in enumerate(model.encoders):
        span = encoder.span(probe.prompt, probe.subject, probe.occurrence)
        noise = _noise(corruption, probe, encoder.name, (span.stop - span.start,), encoder)
        add = partial(_add, noise=noise * sigma_of(corruption, i), span=span)
        hooks.enter_context(rewriting({encoder.name: encoder.word_embedding}, add))


def sigma_of(corruption: Corruption, index: int) -> float:
    """Sigma of one encoder (or of the pooled vector, which comes after them)."""
    sigma = corruption.sigma
    if sigma is None:
        raise UsageError("The corruption's sigma is not resolved; plan the trace first.")
    return sigma[index] if isinstance(sigma, tuple) else sigma


def _add(_name: str, out: Tensor, *, noise: Tensor, span: Span) -> Tensor:
    new = out.clone()
    new[:, span.start : span.stop] += noise.to(out)
    return new


def _noise(
    corruption: Corruption, probe: Probe, name: str, lead: tuple[int, ...], encoder: TextEncoder
) -> Tensor:
    """Standard normal [*lead, D], fixed by noise seed and prompt, the same on any device."""
    return _normal(corruption, probe, name, (*lead, encoder.width))


def _normal(corruption: Corruption, probe: Probe, name: str, shape: tuple[int, ...]) -> Tensor:
    seed = hashlib.sha256(f"{corruption.seed}|{name}|{probe.prompt}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(seed[:8], "big") >> 1)
    return torch.randn(shape, generator=generator)


def _noisy_output(
    model: Model, probe: Probe, corruption: Corruption, clean: Text
) -> tuple[Tensor, Tensor | None]:
    """Noise on the subject's encoded tokens; the pooled vector has no tokens and gets it whole."""
    parts, offset = [], 0
    for i, encoder in enumerate(model.encoders):
        width = encoder.width
        part = clean.cond[..., offset : offset + width]
        span = encoder.span(probe.prompt, probe.subject, probe.occurrence)
        noise = _noise(corruption, probe, encoder.name, (span.stop - span.start,), encoder)
        noise = noise * sigma_of(corruption, i)
        parts.append(_add(encoder.name, part, noise=noise, span=span))
        offset += width
    pooled = clean.pooled
    if pooled is not None:
        sigma = sigma_of(corruption, len(model.encoders))
        noise = _normal(corruption, probe, POOLED, tuple(pooled.shape))
        pooled = pooled + (noise * sigma).to(pooled)
    return torch.cat(parts, dim=-1), pooled


def _encoded_rows(model: Model, probes: Sequence[Probe]) -> list[list[Tensor]]:
    """Per encoder the encoded subject rows of every probe, then the pooled vectors."""
    rows: list[list[Tensor]] = [[] for _ in model.encoders]
    pooled: list[Tensor] = []
    for probe in probes:
        cond, vector = encode_cond(model.pipe, probe.prompt, model.device)
        offset = 0
        for i, encoder in enumerate(model.encoders):
            width = encoder.width
            span = encoder.span(probe.prompt, probe.subject, probe.occurrence)
            rows[i].append(cond[0, span.start : span.stop, offset : offset + width].float())
            offset += width
        if vector is not None:
            pooled.append(vector.float())
    return [*rows, pooled] if pooled else rows


def _spread(rows: list[Tensor]) -> float:
    entries = torch.cat([r.flatten() for r in rows]).double()
    return float(entries.std(correction=0))
