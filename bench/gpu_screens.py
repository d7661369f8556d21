"""A screen beside the exact sweep of the same sites, on a CUDA device.

python bench/gpu_screens.py [--only NAME] [--device cpu] [--out FILE] writes a CSV and prints
Markdown. sd15 and sdxl have those models' shapes and random weights (see gpu.py): what a screen
takes doesn't depend on what the weights are; how well it ranks does, so no correlation is given.
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from gpu import random_pipeline
from workloads import PROBES, quiet

import fasttrace

OUT = Path(__file__).with_suffix(".csv")
WAYS = ("exact sweep", "plain", "averaged:3")


@dataclass(frozen=True)
class Row:
    """One way to rank the sites of one (prompt, seed). first: with tracing of the graphs; seconds:
    once more. generations: of a screen, counted; of a sweep, the runs it makes."""

    card: str
    torch: str
    workload: str
    dtype: str
    sites: int
    calls: int
    way: str
    first: float
    seconds: float
    generations: float
    peak_gib: float


def pipeline(name: str, device: str, dtype: str) -> Any:
    if name == "bundled":
        return fasttrace.load("embedded", device=device, dtype=dtype)
    return random_pipeline(name, device, getattr(torch, dtype))


def measure(card: str, name: str, dtype: str, steps: int, device: str, runs: int) -> list[Row]:
    pipe = pipeline(name, device, dtype)
    rows = []
    for way in WAYS:
        tracer = fasttrace.Tracer(pipe)
        asked: dict[str, Any] = {"seeds": 1, "steps": steps, "metric": "latent_recovery"}
        cuda = device == "cuda"
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if cuda else 0
        took = []
        for _ in range(runs):
            start = time.perf_counter()
            if way == WAYS[0]:
                result = tracer.trace(PROBES[0], pictures=False, **asked)
                generations = float(len(result.rows) + 2)
            else:
                generations = tracer.screen(PROBES[0], estimator=way, **asked).generations
            if cuda:
                torch.cuda.synchronize()
            took.append(time.perf_counter() - start)
        peak = (torch.cuda.max_memory_allocated() - held) / 2**30 if cuda else float("nan")
        sites = len(tracer.sites())
        rows.append(
            Row(
                card,
                torch.__version__,
                name,
                dtype,
                sites,
                steps,
                way,
                took[0],
                min(took[1:], default=float("nan")),
                generations,
                peak,
            )
        )
        print(markdown(rows[-1]), flush=True)
        del tracer
    return rows


HEAD = (
    "| workload | dtype | sites x calls | way | first, s | s | generations | GiB |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def markdown(row: Row) -> str:
    return (
        f"| {row.workload} | {row.dtype} | {row.sites} x {row.calls} | {row.way} | "
        f"{row.first:.2f} | {row.seconds:.3f} | {row.generations:.1f} | {row.peak_gib:.2f} |"
    )


JOBS = {
    "bundled": ("float32", 12, 3),
    "sd15": ("float16", 8, 2),
    "sdxl": ("float16", 2, 2),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda")
    add("--only", action="append", choices=list(JOBS))
    add("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here; --device cpu runs the same, for a smoke test.")
        return 2
    quiet()
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}\n\n{HEAD}", flush=True)
    rows: list[Row] = []
    for name in args.only or list(JOBS):
        dtype, steps, runs = JOBS[name]
        rows += measure(card, name, dtype, steps, args.device, runs)
        gc.collect()
        with args.out.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, [field.name for field in fields(Row)])
            table.writeheader()
            table.writerows(asdict(row) for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
