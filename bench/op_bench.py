"""What `ops.py` does once the process is set up: check, time, write down, print."""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from op_cases import OURS, Case, Named, Tensors, all_cases

from fasttrace_kernels import extension_status
from fasttrace_kernels.testing import assert_within

RESULTS = Path(__file__).with_name("ops.csv")
WARM_UP, LEAST, MOST = 5, 20, 2000  # runs of a form
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass
class Row:
    """ratio: how many times ours is as fast. error: the largest, relative to max(|value|, rms).

    ceiling: what binds an ideal form, "copy" (bytes) or "gemm" (FLOPs), and percent of it as
    measured; on CUDA alone, since what a CPU reads lies in its caches.
    """

    op: str
    shape: str
    dtype: str
    form: str
    median_s: float
    ratio: float
    error: float
    ceiling: str = ""
    percent: float | None = None


class CpuClock:
    def seconds(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class CudaClock:
    """CUDA events, with the L2 cache flushed before.

    The flush keeps the device busy while the host enqueues `run`, so what is measured is the
    device's time and not the host's.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(256 << 20, 2 * cache), dtype=torch.uint8, device=device)

    def seconds(self, run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def check(case: Case) -> dict[str, float | str]:
    """Of every form its error, or what is wrong with it."""
    checked = case.proof or case
    expected, found = checked.expected(), {}
    for name, form in checked.forms.items():
        checked.reset()
        results = [result.cpu() for result in form()]
        try:
            for got, want in zip(results, expected, strict=True):
                assert_within(got, want, checked.tolerance)
            found[name] = max(map(_error, results, expected))
        except AssertionError as error:
            found[name] = str(error)
    return found


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    wide = want.double()
    scale = wide.abs().clamp(min=wide.square().mean().sqrt().item() or 1.0)
    return float(((got.double() - wide) / scale).abs().max())


def timed(
    forms: dict[str, Callable[[], Tensors]],
    reset: Callable[[], object],
    clock: CpuClock | CudaClock,
    seconds: float,
) -> dict[str, list[float]]:
    """Seconds of each run. Forms take turns, and who begins changes with every round."""
    names = list(forms)
    found: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        stop = time.perf_counter() + seconds * len(names)
        rounds = 0
        while rounds < WARM_UP + LEAST or (time.perf_counter() < stop and rounds < MOST):
            for i in range(len(names)):
                name = names[(i + rounds) % len(names)]
                reset()
                took = clock.seconds(forms[name])
                if rounds >= WARM_UP:
                    found[name].append(took)
            rounds += 1
    finally:
        gc.enable()
    return found


@dataclass
class Ceilings:
    """Measured: bytes a second of a copy (read and written), FLOPs a second of a product."""

    copy: float
    gemm: dict[torch.dtype, float]


def measure_ceilings(device: torch.device, clock: CudaClock, quick: bool) -> Ceilings:
    side = 1024 if quick else 8192
    source = torch.zeros(side * side * 16, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = timed({"": lambda: (target.copy_(source),)}, lambda: None, clock, 0.2)
    gemm = {}
    for dtype in DTYPES:
        a = torch.randn(side, side, device=device).to(dtype)  # products of zeros are faster
        took = timed({"": lambda a=a: (a @ a,)}, lambda: None, clock, 0.2)
        gemm[dtype] = 2 * side**3 / median(took[""])
    return Ceilings(2 * source.nbytes / median(copies[""]), gemm)


class Plugin:
    """Gives pytest the cases and keeps what was measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.rows: list[Row] = []
        self.samples: dict[tuple[int, str], list[float] | str] = {}
        self.cases = [case for case in all_cases(self.device, args.quick) if case.op in args.op]
        cuda = self.device.type == "cuda"
        self.clock = CudaClock(self.device) if cuda else CpuClock()
        self.ceilings: Ceilings | None = None
        if isinstance(self.clock, CudaClock):
            self.ceilings = measure_ceilings(self.device, self.clock, args.quick)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        pairs = [(i, form) for i, named in enumerate(self.cases) for form in named.forms]
        ids = [f"{self.cases[i].shape}, {DTYPES[self.cases[i].dtype]}: {f}" for i, f in pairs]
        metafunc.parametrize("measured", pairs, ids=ids, indirect=True)

    @pytest.fixture
    def measured(self, request: pytest.FixtureRequest) -> tuple[Named, list[float] | str]:
        """A form's seconds, or what is wrong with it."""
        i, form = request.param
        if (i, form) not in self.samples:
            with torch.no_grad():
                self._measure(i)
        return self.cases[i], self.samples[i, form]

    def _measure(self, i: int) -> None:
        named = self.cases[i]
        case = named.make()
        errors = check(case)
        right = {form: run for form, run in case.forms.items() if isinstance(errors[form], float)}
        seconds = timed(right, case.reset, self.clock, self.args.seconds)
        for form, error in errors.items():
            self.samples[i, form] = error if isinstance(error, str) else seconds[form]
        if OURS not in right:
            return
        ours = median(seconds[OURS])
        for form, samples in seconds.items():
            took = median(samples)
            row = Row(
                named.op,
                named.shape,
                DTYPES[named.dtype],
                form,
                took,
                took / ours,
                float(errors[form]),
            )
            self._hold_to_ceiling(row, case, named.dtype)
            self.rows.append(row)

    def _hold_to_ceiling(self, row: Row, case: Case, dtype: torch.dtype) -> None:
        if self.ceilings is None:
            return
        least = {
            "copy": case.bytes / self.ceilings.copy,
            "gemm": case.flops / self.ceilings.gemm[dtype],
        }
        row.ceiling = max(least, key=lambda name: least[name])
        row.percent = 100 * least[row.ceiling] / row.median_s


def write(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            numbers = {k: f"{v:.4g}" for k, v in asdict(row).items() if isinstance(v, float)}
            writer.writerow(asdict(row) | numbers)


def table(rows: list[Row]) -> str:
    """One an op. A ratio is a form's time over ours."""
    lines: list[str] = []
    for op, group in groupby(rows, key=lambda row: row.op):
        lines += ["", f"**{op}**", "", "| shape | dtype | form | median, µs | ratio | error |"]
        lines += ["| --- | --- | --- | ---: | ---: | ---: |"]
        for row in group:
            of = f"{row.form} ({row.percent:.0f} % of {row.ceiling})" if row.percent else row.form
            numbers = f"{row.median_s * 1e6:.1f} | {row.ratio:.2f} | {row.error:.1e}"
            lines.append(f"| {row.shape} | {row.dtype} | {of} | {numbers} |")
    return "\n".join(lines[1:])


def machine(device: torch.device, ceilings: Ceilings | None, load: float) -> str:
    words = (
        f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, "
        f"load average {load:.2f} before and {os.getloadavg()[0]:.2f} after, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    if device.type == "cpu":
        return f"{words}; {extension_status().sentence}"
    assert ceilings is not None
    gemm = ", ".join(f"{rate / 1e12:.0f} TFLOP/s {DTYPES[d]}" for d, rate in ceilings.gemm.items())
    return (
        f"{torch.cuda.get_device_name(device)}; {words}; "
        f"measured ceilings: copy {ceilings.copy / 1e9:.0f} GB/s, product {gemm}"
    )


def parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ops = ["patch_rows_", "guided_step_", "patch_attention"]
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--op", choices=ops, nargs="+", default=ops, help="all by default")
    add("--seconds", type=float, default=1.0, help="of every form, 1 by default")
    add("--quick", action="store_true", help="smoke test: few rows, few runs")
    add("--out", type=Path, help=f"{RESULTS.name} beside this script; with --quick nothing")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    if args.quick:
        args.seconds = 0.0
    elif args.out is None:
        args.out = RESULTS
    return args


def main(description: str | None) -> int:
    """The exit status: 1 where a form was wrong."""
    args = parse(description)
    load = os.getloadavg()[0]
    plugin = Plugin(args)
    # Without the tests' settings, which ask for plugins that a bench doesn't need.
    options = ["-c", os.devnull, "-q", "--no-header", "--assert=plain", "-p", "no:cacheprovider"]
    options += ["--benchmark-group-by=group", "--benchmark-columns=min,median,iqr,rounds"]
    script = Path(__file__).with_name("op_tests.py")
    with contextlib.redirect_stdout(sys.stderr):
        failed = pytest.main([*options, str(script)], plugins=[plugin])
    if args.out:
        write(args.out, plugin.rows)
    print(table(plugin.rows))
    print(f"\n{machine(plugin.device, plugin.ceilings, load)}")
    return int(failed != 0)
