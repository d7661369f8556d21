"""Keys and goals: what a matrix reads at the tokens of a pair. Nothing above it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.text import TextEncoder, encode_cond
from fasttrace.edit.layer_zero import is_layer_zero, read_layer_zero
from fasttrace.edit.phrases import Fact, Facts
from fasttrace.edit.solver import Moments
from fasttrace.errors import ModelError

AT_ONCE = 128  # prompts in one pass


@dataclass
class Read:
    """What was read for one group of matrices, a pair a row, keys and goals [n, d] each.

    Where there are more pairs than inputs only their sums are kept.
    """

    width: int
    pairs: int
    device: torch.device
    keys: list[Tensor] = field(default_factory=list)
    goals: list[Tensor] = field(default_factory=list)
    moments: Moments | None = None

    def __post_init__(self) -> None:
        if self.pairs > self.width:
            self.moments = Moments.zero(self.width, self.device)

    def add(self, keys: Tensor, goals: Tensor) -> None:
        if self.moments is not None:
            self.moments.add_(keys, goals)
        else:
            self.keys.append(keys.double())
            self.goals.append(goals.double())

    @property
    def is_finite(self) -> bool:
        """Waits for the device."""
        sums = [] if self.moments is None else [self.moments.keys, self.moments.steps]
        return all(bool(torch.isfinite(t).all()) for t in (*self.keys, *self.goals, *sums))


class _Enough(Exception):
    """Everything asked for has been read; what lies above isn't needed."""


def read_text(
    encoder: TextEncoder, modules: Mapping[str, nn.Linear], facts: Facts, keep: float
) -> dict[str, Read]:
    """By name, the inputs of an encoder's linear layers. keep: the weight of what is preserved."""
    reads = {
        name: Read(module.in_features, facts.pairs, module.weight.device)
        for name, module in modules.items()
    }
    shared = is_layer_zero(encoder, modules)
    for chunk, numbers in _chunks(facts):
        given = _given(encoder, [facts.prompts[n] for n in numbers], _length(chunk))
        if shared:
            found = dict.fromkeys(modules, read_layer_zero(encoder, given["input_ids"]))
        else:
            found = _run(encoder, modules, given)
        for name, rows in found.items():
            reads[name].add(*_pairs(chunk, numbers, rows, keep))
    return reads


def read_embedding(model: Model, facts: Facts, keep: float) -> Read:
    """The text embedding, which every cross-attention's keys and values are made from."""
    read = Read(_width(model), facts.pairs, model.device)
    for chunk, numbers in _chunks(facts):
        rows, _ = encode_cond(model.pipe, [facts.prompts[n] for n in numbers], model.device)
        read.add(*_pairs(chunk, numbers, rows, keep))
    return read


def _width(model: Model) -> int:
    """Of the text embedding; some configurations give it block by block."""
    given = model.unet.config.cross_attention_dim
    widths: list[int] = []
    left = [given]
    while left:
        each = left.pop()
        if isinstance(each, list | tuple):
            left += each
        else:
            widths.append(int(each))
    if len(set(widths)) != 1:
        raise ModelError(
            f"The UNet's cross-attention has inputs of several widths ({given}), so its keys and "
            "values can't be edited together: name sites in the text encoder instead."
        )
    return widths[0]


def _given(encoder: TextEncoder, prompts: list[str], length: int) -> dict[str, Tensor]:
    """What the encoder is called with: the first `length` tokens of each prompt.

    A causal encoder's first tokens don't depend on later ones, so later ones are left out.
    """
    tokenizer, device = encoder.tokenizer, encoder.word_embedding.weight.device
    given = tokenizer(
        [encoder.convert(prompt) for prompt in prompts],
        padding="max_length",
        max_length=encoder.window,
        return_tensors="pt",
    )
    length = length if encoder.causal else encoder.window
    found: dict[str, Tensor] = {"input_ids": given.input_ids[:, :length].to(device)}
    if getattr(encoder.module.config, "use_attention_mask", False) or not encoder.causal:
        found["attention_mask"] = given.attention_mask[:, :length].to(device)
    return found


def _run(
    encoder: TextEncoder, modules: Mapping[str, nn.Module], given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inputs [prompts, length, d] of each module."""
    seen: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].detach()
            if len(seen) == len(modules):
                raise _Enough

        return hook

    handles = [m.register_forward_pre_hook(hook_for(name)) for name, m in modules.items()]
    try:
        with suppress(_Enough):
            encoder.module(**given)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _chunks(facts: Facts) -> Iterator[tuple[list[Fact], list[int]]]:
    """Facts whose prompts go through the encoder together, with those prompts' numbers."""
    chunk: list[Fact] = []
    numbers: dict[int, None] = {}
    for fact in facts.facts:
        needed = [fact.prompt, *(prompt for prompt, _, _ in fact.goal)]
        new = [n for n in needed if n not in numbers]
        if chunk and len(numbers) + len(new) > AT_ONCE:
            yield chunk, list(numbers)
            chunk, numbers, new = [], {}, needed
        chunk.append(fact)
        numbers.update(dict.fromkeys(new))
    if chunk:
        yield chunk, list(numbers)


def _length(chunk: Sequence[Fact]) -> int:
    return max(
        place + fact.length
        for fact in chunk
        for place in (fact.position, *(position for _, position, _ in fact.goal))
    )


def _pairs(
    chunk: Sequence[Fact], numbers: Sequence[int], rows: Tensor, keep: float
) -> tuple[Tensor, Tensor]:
    """Keys and goals [n, d] out of the prompts' rows [prompts, tokens, d]."""
    at = {number: i for i, number in enumerate(numbers)}
    keys, goals = [], []
    for fact in chunk:
        key = rows[at[fact.prompt], fact.position : fact.position + fact.length].double()
        if fact.goal:
            goal = sum(
                rows[at[prompt], place : place + fact.length].double() * share
                for prompt, place, share in fact.goal
            )
        else:
            key = goal = key * keep**0.5
        keys.append(key)
        goals.append(goal)
    return torch.cat(keys), torch.cat(goals)  # type: ignore[arg-type]  # sums of tensors
