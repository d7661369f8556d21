"""Sweeps on a CUDA device: fasttrace beside lanes batched by hand and one lane at a time.

python bench/gpu.py [--only NAME] [--quick] [--device cpu] [--out FILE] writes a CSV and prints
Markdown. sd15 and sdxl have those models' shapes and random weights: what a sweep takes doesn't
depend on what the weights are, and what a lane recovers is compared way against way.
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from measure import noise_floor, scores
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from ways import Fast, Runner, Runs, batched, sequential
from workloads import PROBES, Sweep, Workload, make_sweep, quiet

import fasttrace
from fasttrace.adapters.architectures import ARCHITECTURES
from fasttrace.adapters.pipeline import Model, embedded_folder
from fasttrace.adapters.scope import scope
from fasttrace.engine.base import CLEAN, CORRUPT
from fasttrace.engine.fast import FastEngine
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.store.probes import read_probes
from fasttrace.testing import runs_of_pairs
from fasttrace.testing.tiny import make_scheduler, tiny_tokenizer
from fasttrace.types import Sampling

OUT = Path(__file__).with_name("gpu.csv")


@dataclass(frozen=True)
class Row:
    """One way on one sweep. lanes: patched runs. flops: counted, fasttrace's only. worst: largest
    difference of a score from the first way's, over the lanes that both ran."""

    card: str
    torch: str
    workload: str
    dtype: str
    sites: int
    calls: int
    way: str
    lanes: int
    seconds: float
    fastest: float
    slowest: float
    runs: int
    first: float
    flops: int
    peak_gib: float
    worst: float
    floor: float | None


def random_pipeline(name: str, device: str, dtype: torch.dtype) -> Any:
    """Stable Diffusion 1.5's or SDXL's UNet and text widths, weights as torch draws them."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 77
    config = ARCHITECTURES[name]["unet"]

    def encoder(build: Any, width: int) -> Any:
        return build(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=4,
                num_attention_heads=width // 64,
                max_position_embeddings=77,
                projection_dim=width,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )

    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            unet = UNet2DConditionModel(**config)
            encoders = [encoder(CLIPTextModel, 768)]
            if name == "sdxl":
                encoders.append(encoder(CLIPTextModelWithProjection, 1280))
            vae = AutoencoderKL(  # latent scores decode nothing
                block_out_channels=(8,) * 4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                norm_num_groups=4,
                latent_channels=4,
            )
    finally:
        torch.set_default_dtype(before)
    # As initialised, a caption hardly moves the picture and there would be nothing to recover.
    with torch.no_grad():
        for name_, weight in (
            *unet.named_parameters(),
            *(pair for part in encoders for pair in part.named_parameters()),
        ):
            if name_.endswith(("attn2.to_v.weight", "attn2.to_q.weight")):
                weight.mul_(4.0)
            elif "token_embedding" in name_:
                weight.mul_(20.0)
    parts = {
        "vae": vae,
        "text_encoder": encoders[0],
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": make_scheduler("DDIM"),
    }
    if name == "sdxl":
        return StableDiffusionXLPipeline(
            **parts, text_encoder_2=encoders[1], tokenizer_2=tokenizer, add_watermarker=False
        )
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def bundled(device: str, dtype: torch.dtype, steps: int, prompts: int) -> Workload:
    name = str(dtype).removeprefix("torch.")
    model = Model(fasttrace.load("embedded", device=device, dtype=name))
    folder = embedded_folder("model")
    entries = read_probes(folder.parent / "probes.json")[:prompts]
    return _workload("bundled", model, [e.probe() for e in entries], steps)


def random(name: str, device: str, dtype: torch.dtype, steps: int) -> Workload:
    return _workload(name, Model(random_pipeline(name, device, dtype)), PROBES[:1], steps, 7.5)


def _workload(
    name: str, model: Model, probes: Sequence[Any], steps: int, guidance: float | None = None
) -> Workload:
    sampling = Sampling(
        steps=steps,
        guidance=float(guidance or model.default("guidance")),
        height=int(model.default("height")),
        width=int(model.default("width")),
    )
    return Workload(name, Path(), model, tuple(probes), sampling)


def fast(**options: Any) -> Callable[[Workload], Runner]:
    def make(workload: Workload) -> Runner:
        way = Fast(workload)
        way.engine = FastEngine(workload.model, **options)
        return way

    return make


def reference(workload: Workload) -> Runner:
    engine = ReferenceEngine(workload.model)
    return lambda sweep: runs_of_pairs(engine, sweep.engine_pairs())


def some(sweep: Sweep, every: int) -> Sweep:
    """Each so-manieth lane of it."""
    return replace(sweep, pairs=tuple(replace(p, lanes=p.lanes[::every]) for p in sweep.pairs))


@dataclass(frozen=True)
class Asked:
    """A way to run it. every: of the lanes only each so-manieth, where all would take too long."""

    label: str
    make: Callable[[Workload], Runner]
    every: int = 1


def measure(
    card: str, work: Workload, ways: Sequence[Asked], runs: int, rows: list[Row], write: Any
) -> None:
    """The first way is what the others are held against. Each runs once before it is timed."""
    cuda = work.model.device.type == "cuda"
    dtype = str(work.model.dtype).removeprefix("torch.")
    with scope(work.model.pipe):
        whole = make_sweep(work, "unet")
        expected: dict[tuple[int, int], float] = {}
        made = [(way, way.make(work), some(whole, way.every)) for way in ways]
        first: dict[str, float] = {}
        worst: dict[str, float] = {}
        floors: dict[str, float | None] = {}
        peaks: dict[str, float] = {}
        for way, run, sweep in made:
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            start = time.perf_counter()
            found = run(sweep)
            own = scores(sweep, found)
            first[way.label] = time.perf_counter() - start
            peaks[way.label] = (
                (torch.cuda.max_memory_allocated() - held) / 2**30 if cuda else float("nan")
            )
            own = {(n, i * way.every): value for (n, i), value in own.items()}
            expected = expected or own
            shared = own.keys() & expected.keys()
            worst[way.label] = max(abs(own[key] - expected[key]) for key in shared)
            floors[way.label] = noise_floor(sweep, found)
            largest = max(map(abs, own.values()))
            moved = _moved(found)
            print(
                f"# {work.name} {dtype} {way.label}: first {first[way.label]:.2f} s, worst "
                f"{worst[way.label]:.2e} of {len(shared)}, floor {floors[way.label]}, largest "
                f"score {largest:.3f}, clean to corrupt {moved:.3f}",
                flush=True,
            )
        seconds: dict[str, list[float]] = {way.label: [] for way in ways}
        flops: dict[str, int] = {}
        for _ in range(runs):
            for way, run, sweep in made:
                before = run.engine.executed if isinstance(run, Fast) else 0
                start = time.perf_counter()
                scores(sweep, run(sweep))
                seconds[way.label].append(time.perf_counter() - start)
                flops[way.label] = (run.engine.executed - before) if isinstance(run, Fast) else 0
        for way, _, sweep in made:
            took = seconds[way.label] or [float("nan")]
            rows.append(
                Row(
                    card,
                    torch.__version__,
                    work.name,
                    dtype,
                    len(whole.pairs[0].lanes),
                    work.calls,
                    way.label,
                    sum(len(pair.lanes) for pair in sweep.pairs),
                    median(took),
                    min(took),
                    max(took),
                    len(seconds[way.label]),
                    first[way.label],
                    flops.get(way.label, 0),
                    peaks[way.label],
                    worst[way.label],
                    floors[way.label],
                )
            )
            print(markdown(rows[-1]), flush=True)
        write()


def _moved(runs: Runs) -> float:
    """Root mean square between clean and corrupt by the corrupt run's own."""
    clean, corrupt = runs[0, CLEAN].float(), runs[0, CORRUPT].float()
    return float((clean - corrupt).square().mean().sqrt() / corrupt.square().mean().sqrt())


HEAD = (
    "| workload | dtype | calls | way | lanes | s | ms a lane-call | counted TFLOP/s | GiB | "
    "worst difference |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def markdown(row: Row) -> str:
    per_call = 1000 * row.seconds / (row.lanes * row.calls)
    rate = f"{row.flops / row.seconds / 1e12:.0f}" if row.flops else ""
    return (
        f"| {row.workload} | {row.dtype} | {row.calls} | {row.way} | {row.lanes} | "
        f"{row.seconds:.3f} | {per_call:.3f} | {rate} | {row.peak_gib:.2f} | {row.worst:.1e} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda")
    add("--only", action="append", choices=["bundled", "sd15", "sd15-full", "sdxl"])
    add("--quick", action="store_true", help="smoke test: few captions and steps, one run")
    add("--out", type=Path, help=f"{OUT.name} beside this script; with --quick nothing")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here; --device cpu runs the same, for a smoke test.")
        return 2
    quiet()
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    out = args.out or (None if args.quick else OUT)
    rows: list[Row] = []

    def write() -> None:
        if out is None:
            return
        with out.open("w", newline="") as file:
            table = csv.DictWriter(file, [field.name for field in fields(Row)])
            table.writeheader()
            table.writerows(asdict(row) for row in rows)

    names = args.only or ["bundled", "sd15", "sdxl", "sd15-full"]
    quick, device = args.quick, args.device
    half = torch.float16 if device == "cuda" else torch.float32
    print(f"{card}, torch {torch.__version__}\n\n{HEAD}", flush=True)
    with torch.no_grad():
        for name in names:
            started = time.perf_counter()
            for job in JOBS[name](quick, device, half):
                measure(card, *job, rows, write)
                del job
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
            print(f"# {name}: {time.perf_counter() - started:.0f} s in all", flush=True)
    return 0


def _bundled(quick: bool, device: str, half: torch.dtype) -> Any:
    prompts, steps, runs = (1, 4, 1) if quick else (4, 10, 3)
    ways = [
        Asked("one lane at a time, hooks", lambda _: sequential, every=1 if quick else 8),
        Asked("lanes batched by hand, hooks", lambda _: batched),
        Asked("fasttrace", fast()),
    ]
    if device == "cuda":
        ways.append(Asked("fasttrace without CUDA graphs", fast(runner="eager")))
    for dtype in dict.fromkeys((torch.float32, half)):
        yield bundled(device, dtype, steps, prompts), ways, runs


def _sd15(quick: bool, device: str, half: torch.dtype) -> Any:
    ways = [
        Asked("one lane at a time, hooks", lambda _: sequential, every=1 if quick else 10),
        Asked("lanes batched by hand, hooks", lambda _: batched),
        Asked("fasttrace", fast()),
    ]
    if device == "cuda":
        ways.append(Asked("fasttrace, torch's attention", fast(attention="torch")))
    yield random("sd15", device, half, 2 if quick else 8), ways, 0 if quick else 2


def _sd15_full(quick: bool, device: str, half: torch.dtype) -> Any:
    yield (
        random("sd15", device, half, 3 if quick else 50),
        [Asked("fasttrace", fast())],
        0,
    )


def _sdxl(quick: bool, device: str, half: torch.dtype) -> Any:
    ways = [
        Asked("reference engine, one lane at a time", reference, every=57),
        Asked("fasttrace", fast()),
    ]
    yield random("sdxl", device, half, 1 if quick else 2), ways, 0 if quick else 1


JOBS: dict[str, Any] = {
    "bundled": _bundled,
    "sd15": _sd15,
    "sd15-full": _sd15_full,
    "sdxl": _sdxl,
}

if __name__ == "__main__":
    sys.exit(main())
