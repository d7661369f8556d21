"""What a trace will take, before it runs: FLOPs, memory, and time from a short calibration."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fasttrace.engine.arrange import Chunk, arrange, memory_of
from fasttrace.engine.compiled import Denoiser
from fasttrace.engine.flops import count
from fasttrace.engine.options import Options
from fasttrace.engine.work import bound
from fasttrace.types import Lane

# Peak 16-bit tensor-core TFLOP/s without sparsity, from the makers' data sheets. For planning on
# paper: nobody here has measured fasttrace on any of them.
DEVICES = {
    "T4": 65,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "A10G": 70,
    "L4": 121,
    "A100": 312,
    "H100": 989,
    "H200": 989,
}
ASSUMED = 0.4  # of the peak: a guess, and labelled as one


@dataclass(frozen=True)
class Prediction:
    """lanes: patched runs. batches: in which they are made. pairs: run together at a time.

    flops: everything computed. useful_flops: the clean, corrupt and patched runs alone.
    bound_flops: the least an exact trace needs. plain_flops: one whole run a lane. peak_bytes: on
    top of the model's weights and without decoding, of which cache_bytes are clean activations.
    clean: "cache", "leader", or both. seconds: None without a calibration.
    """

    calls: int
    lanes: int
    pairs: int
    batches: int
    largest_batch: int
    flops: int
    useful_flops: int
    bound_flops: int
    plain_flops: int
    peak_bytes: int
    cache_bytes: int
    clean: str
    pruned_batches: int
    shared_calls: int
    seconds: float | None = None


def predict(
    lanes: Sequence[Sequence[Lane]],
    denoiser: Denoiser,
    options: Options,
    *,
    calls: int,
    guided: bool,
    linear: bool = True,
    own_texts: bool = False,
    itemsize: int = 4,
    negatives: Sequence[str] | None = None,
    memory: int | None = None,
) -> Prediction:
    """lanes: of each pair; the engine is given so many together as `options.pairs` says.

    negatives: each pair's negative prompt; None is one for all. memory: as of `arrange`.
    """
    chunks: list[Chunk] = []
    for group in range(0, len(lanes), options.pairs):
        start, stop = group, min(group + options.pairs, len(lanes))
        while start < stop:
            chunk = arrange(
                lanes[start:stop],
                denoiser,
                options,
                calls=calls,
                guided=guided,
                linear=linear,
                own_texts=own_texts,
                itemsize=itemsize,
                negatives=negatives and negatives[start:stop],
                memory=memory,
            )
            chunks.append(chunk)
            start += chunk.pairs
    cost = denoiser.cost
    useful = sum(c.work.useful(cost, c.todo) for c in chunks)
    least = sum(bound(cost, c.setting, c.pairs, c.todo) for c in chunks)
    count_of = sum(len(c.todo) for c in chunks)
    row = cost.whole * (2 if guided else 1)
    plain = (count_of + 2 * len(lanes)) * calls * row
    batches = [batch for c in chunks for batch in c.work.batches]
    return Prediction(
        calls=calls,
        lanes=count_of,
        pairs=max((c.pairs for c in chunks), default=0),
        batches=len(batches),
        largest_batch=max((batch.size for batch in batches), default=0),
        flops=sum(c.work.flops(denoiser) for c in chunks),
        useful_flops=useful,
        bound_flops=least,
        plain_flops=plain,
        peak_bytes=max((memory_of(c, denoiser, itemsize) for c in chunks), default=0),
        cache_bytes=max((c.cache_bytes for c in chunks), default=0),
        clean=_clean(chunks),
        pruned_batches=sum(batch.pruned is not None for batch in batches),
        shared_calls=sum(len(c.work.stairs) for c in chunks),
    )


def _clean(chunks: Sequence[Chunk]) -> str:
    kept = {len(c.setting.cached) < len(c.shapes) for c in chunks if c.setting.cached}
    if not kept:
        return "leader"
    return "cache and leader" if True in kept else "cache"


def calibrate(denoiser: Denoiser, rows: int, seconds: float = 0.5) -> float:
    """FLOP/s of the body at so many rows, or fewer where that takes long, where the weights are.

    seconds: what one measurement may take; rows are doubled until it does.
    """
    tried = min(2, rows)
    while True:
        rate, took = _rate(denoiser, tried)
        if tried == rows or 2 * took > seconds:
            return rate
        tried = min(2 * tried, rows)


def _rate(denoiser: Denoiser, rows: int, calls: int = 2) -> tuple[float, float]:
    """FLOP/s, and the seconds it took."""
    device = next(iter(denoiser.weights.values())).device
    graph = denoiser.body.at(rows)
    places = [n for n in graph.module.graph.nodes if n.op == "placeholder"]
    values = dict(denoiser.weights)
    for name, place in zip(graph.reads, places, strict=True):
        if name not in values:
            like = place.meta["val"]  # none: an index of each row
            shape, dtype = ((rows,), torch.int64) if like is None else (like.shape, like.dtype)
            values[name] = torch.zeros(shape, dtype=dtype, device=device)
    with torch.no_grad():
        graph(values)
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            graph(values)
        _wait(device)
    took = time.perf_counter() - start
    return calls * count(graph) / took, took


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
