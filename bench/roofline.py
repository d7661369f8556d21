"""What the kernels would take at least on two GPUs, from their data sheets.

python -m bench.roofline [--write]     from the root of the repository
    prints Markdown; --write also puts it into docs/kernels.md.

Estimates: arithmetic on published peaks, and nothing that was measured.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "kernels.md"
MARKERS = ("<!-- roofline -->", "<!-- end of roofline -->")

HALF, FLOAT = 2, 4  # bytes
LANES = 16  # and twice as many rows, for guidance


@dataclass(frozen=True)
class Gpu:
    """Peaks of a data sheet. Exponentials: 16 a clock and multiprocessor, at the clock that
    makes the tensor peak (CUDA C++ Programming Guide, throughput of arithmetic instructions)."""

    name: str
    tensor_flops: float  # a second, fp16, dense
    bytes: float  # a second, of device memory
    flops_per_exponential: int  # tensor FLOPs of a multiprocessor in the time of one exponential

    @property
    def exponentials(self) -> float:
        return self.tensor_flops / self.flops_per_exponential

    @property
    def ridge(self) -> float:
        """FLOPs a byte above which arithmetic binds."""
        return self.tensor_flops / self.bytes


GPUS = (
    Gpu("A100 40 GB", 312e12, 1.555e12, 2048 // 16),
    Gpu("A100 80 GB", 312e12, 2.039e12, 2048 // 16),
    Gpu("H100 SXM", 989e12, 3.35e12, 4096 // 16),
)


@dataclass(frozen=True)
class Work:
    """What one launch has to do."""

    name: str
    flops: float  # of the definition
    tensor_flops: float  # of them on tensor cores, with the zeros that fill up tiles
    bytes: float  # each input read once, each output written once
    exponentials: float = 0

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes


@dataclass(frozen=True)
class Estimate:
    seconds: float
    binds: str  # "memory", "tensor cores" or "exponentials"


def estimate(work: Work, gpu: Gpu) -> Estimate:
    """The slowest of the three, as if the other two were hidden behind it."""
    times = {
        "memory": work.bytes / gpu.bytes,
        "tensor cores": work.tensor_flops / gpu.tensor_flops,
        "exponentials": work.exponentials / gpu.exponentials,
    }
    binds = max(times, key=lambda side: times[side])
    return Estimate(times[binds], binds)


def parts(size: int) -> int:
    """A head size, or a number of keys below one tile, made of powers of two from 16 on: what of
    it reaches the tensor cores. 40 = 32 + 16, 77 = 64 + 16."""
    filled = -(-size // 16) * 16
    largest = 1 << (filled.bit_length() - 1)
    rest = filled - largest
    return largest + (1 << (rest - 1).bit_length() if rest else 0)


def attention(name: str, *, rows: int, heads: int, queries: int, keys: int, size: int) -> Work:
    """patch_attention in fp16: rows x heads of [queries, size] against [keys, size]."""
    scores = rows * heads * queries * keys
    padded = rows * heads * queries * (parts(keys) if keys < 128 else keys)
    moved = 2 * rows * heads * size * (queries + keys) * HALF
    return Work(name, 4.0 * scores * size, 4.0 * padded * parts(size), moved, scores)


def rows_patch(name: str, *, lanes: int, elements: int) -> Work:
    """patch_rows_ in fp16, every lane patched at a strength between 0 and 1: row and source read,
    row written; a subtraction, a product and a sum."""
    moved = 3 * lanes * elements * HALF
    return Work(name, 3.0 * lanes * elements, 0, moved)


def guided_step(name: str, *, lanes: int, elements: int, latents: int, predictions: int) -> Work:
    """guided_step with guidance and without noise; fp16 activations, fp32 state.

    Read: both branches of the prediction and the kept slots (the newest prediction is the one just
    made). Written: as many slots, shifted by one, and the next input of both branches.
    """
    slots = latents + predictions
    kept = slots - 1
    a_lane = elements * (2 * HALF + kept * FLOAT + kept * FLOAT + 2 * HALF)
    # Guidance: 3. Weighted sum: a product a slot, and a sum for all but the first. Scale: 1.
    return Work(name, lanes * elements * (3.0 + 2 * slots - 1 + 1), 0, lanes * a_lane)


def works() -> dict[str, list[Work]]:
    """By model: launches of one denoiser call with 16 lanes and guidance, so 32 rows, at the
    model's own picture size. 77 text tokens."""

    def both(rows: int, heads: int, tokens: int, size: int) -> list[Work]:
        shape = f"{heads} heads of {size}, {tokens:,} tokens"
        dims = {"rows": rows, "heads": heads, "queries": tokens, "size": size}
        return [
            attention(f"patch_attention, self, {shape}", keys=tokens, **dims),
            attention(f"patch_attention, cross, {shape}", keys=77, **dims),
        ]

    rows = 2 * LANES
    sd = [work for tokens, size in ((4096, 40), (1024, 80), (256, 160), (64, 160))
          for work in both(rows, 8, tokens, size)]  # fmt: skip
    sd.append(rows_patch("patch_rows_, 320 x 64 x 64", lanes=LANES, elements=320 * 64 * 64))
    sdxl = [work for tokens, heads in ((4096, 10), (1024, 20))
            for work in both(rows, heads, tokens, 64)]  # fmt: skip
    sdxl.append(rows_patch("patch_rows_, 320 x 128 x 128", lanes=LANES, elements=320 * 128 * 128))
    pndm = {"latents": 2, "predictions": 4}
    sd.append(
        guided_step("guided_step_, PNDM, 4 x 64 x 64", lanes=LANES, elements=4 * 64**2, **pndm)
    )
    euler = {"latents": 1, "predictions": 1}
    sdxl.append(
        guided_step("guided_step_, Euler, 4 x 128 x 128", lanes=LANES, elements=4 * 128**2, **euler)
    )
    return {"SD 1.5, 512 x 512": sd, "SDXL, 1024 x 1024": sdxl}


def markdown() -> str:
    header = ["kernel", "GFLOP", "of them on tensor cores, padded", "MB", "FLOP a byte"]
    header += [f"{gpu.name}: at least, bound by" for gpu in GPUS]
    lines = []
    for model, launches in works().items():
        lines += [f"**{model}**, {LANES} lanes with guidance, fp16. An estimate.", ""]
        lines += [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
        for work in launches:
            numbers = (work.flops / 1e9, work.tensor_flops / 1e9, work.bytes / 1e6, work.intensity)
            row = [work.name, *map(_three_digits, numbers)]
            for gpu in GPUS:
                found = estimate(work, gpu)
                row.append(f"{_three_digits(found.seconds * 1e6)} µs, {found.binds}")
            lines.append(_row(row))
        lines.append("")
    return "\n".join(lines).strip()


def _three_digits(number: float) -> str:
    return f"{float(f'{number:.3g}'):,g}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="renew the page")
    text = markdown()
    print(text)
    if parser.parse_args().write:
        from bench.machine_code_table import write

        write(text, MARKERS, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
