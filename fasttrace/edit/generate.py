"""Pictures of many prompts under many edits in one batch: each is a lane of the fast engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from fasttrace.adapters.pipeline import Model, Start
from fasttrace.adapters.scope import scope
from fasttrace.adapters.text import Text
from fasttrace.edit.edit import Edit
from fasttrace.engine.base import CLEAN, CORRUPT, Engine, Pair
from fasttrace.errors import UsageError
from fasttrace.types import Lane, Sampling

AT_ONCE = 64  # prompts in one pass of the encoder


@dataclass(frozen=True)
class Order:
    """Pictures of `prompts` from one first latent, under an edit or none."""

    prompts: tuple[str, ...]
    seed: int
    edit: Edit | None = None


@dataclass(frozen=True)
class _Numbered(Lane):
    """A lane that differs from its neighbours by its text alone."""

    number: int = 0


def generate(
    model: Model, engine: Engine, orders: Sequence[Order], sampling: Sampling
) -> Iterator[tuple[int, list[int], Tensor]]:
    """(order, numbers of its prompts, their final latents [B, C, h, w]), as they come.

    Edits of text encoders share batches and touch no weight; an edit of the UNet is applied while
    its own orders run.
    """
    by_text = [i for i, order in enumerate(orders) if not of_unet(order.edit)]
    yield from _run(model, engine, orders, by_text, sampling)
    by_unet: dict[int, list[int]] = {}
    for i, order in enumerate(orders):
        if of_unet(order.edit):
            by_unet.setdefault(id(order.edit), []).append(i)
    for numbers in by_unet.values():
        edit = orders[numbers[0]].edit
        assert edit is not None
        with edit.applied(model.pipe):
            yield from _run(model, engine, orders, numbers, sampling)


@contextmanager
def felt(model: Model, edit: Edit | None) -> Iterator[None]:
    """Linear layers answer as if the edit were in their weights, which stay as they are.

    Raises `ModelError` where they are not those it was made for.
    """
    with ExitStack() as stack:
        for matrix in [] if edit is None else edit.matrices(model):
            assert edit is not None
            module, change = matrix.module, edit.changes[matrix.name]
            sides = (change.left,) if change.whole else (change.right, change.left)
            handle = module.register_forward_hook(_adding([s.to(module.weight) for s in sides]))
            stack.callback(handle.remove)
        yield


def _adding(sides: Sequence[Tensor]) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        moved = args[0]
        for side in sides:
            moved = linear(moved, side)
        return output + moved

    return hook


def encode(
    model: Model,
    prompts: Sequence[str],
    edit: Edit | None,
    sampling: Sampling,
    begin: Start | None = None,
) -> list[Text]:
    """What the denoiser reads of each prompt under an edit of the text encoders.

    begin: where the runs begin, which a prior's image embedding depends on.
    """
    texts: list[Text] = []
    with nullcontext() if edit is None or of_unet(edit) else felt(model, edit):
        first = model.text(prompts[0], "", model.guided(sampling), begin)
        for start in range(0, len(prompts), AT_ONCE):
            part = list(prompts[start : start + AT_ONCE])
            texts += model.encode(part, first)
    return texts


def of_unet(edit: Edit | None) -> bool:
    return edit is not None and any(name.startswith("unet.") for name in edit.changes)


def _run(
    model: Model,
    engine: Engine,
    orders: Sequence[Order],
    numbers: Sequence[int],
    sampling: Sampling,
) -> Iterator[tuple[int, list[int], Tensor]]:
    """An order is one of the engine's pairs; its first two prompts are what it calls clean and
    corrupt, the others lanes with texts of their own."""
    if not numbers:
        return
    with scope(model.pipe):
        pairs = [_pair(model, orders[i], sampling) for i in numbers]
    runs = engine.run(pairs)
    while True:
        with scope(model.pipe):
            finished = next(runs, None)
        if finished is None:
            return
        groups: dict[int, list[tuple[int, int]]] = {}
        for row, (pair, run) in enumerate(finished.runs):
            place = {CLEAN: 0, CORRUPT: 1}.get(str(run))
            if place is None and not isinstance(run, int):
                continue  # copies for the noise floor
            number = int(run) + 2 if place is None else place
            if number < len(orders[numbers[pair]].prompts):
                groups.setdefault(pair, []).append((number, row))
        for pair, found in groups.items():
            rows = [row for _, row in found]
            yield numbers[pair], [number for number, _ in found], finished.latents[rows]


def _pair(model: Model, order: Order, sampling: Sampling) -> Pair:
    if not order.prompts:
        raise UsageError("There is no prompt to make a picture of.")
    begin = model.start(sampling, order.seed)
    texts = encode(model, order.prompts, order.edit, sampling, begin)
    first, second, rest = texts[0], texts[min(1, len(texts) - 1)], texts[2:]

    def of_lanes(lanes: Sequence[Lane]) -> list[Text]:
        return [rest[lane.number] for lane in lanes if isinstance(lane, _Numbered)]

    return Pair(
        texts={CLEAN: first, CORRUPT: second},
        base=CLEAN,
        start=begin,
        sampling=sampling,
        lanes=tuple(_Numbered(number=i) for i in range(len(rest))),
        lane_texts=of_lanes,
    )
