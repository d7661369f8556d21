"""How long an edit takes at CLIP-L's size, and how much memory."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from concepts import phrase_pairs
from exactness import MATRIX, VAN_GOGH, out_proj
from figures import Figure
from torch import Tensor

from fasttrace import Editor
from fasttrace.adapters.pipeline import Model
from fasttrace.edit.edit import Edit
from fasttrace.edit.phrases import TEMPLATES, Tokens, collect, parse_replacements

LIMITS: dict[Tokens, float] = {"last": 10, "last_to_end": 60}  # seconds for 1,000 concepts
MANY, FEW = 1000, 250
SAME = 1e-4  # of the change; keys are float32, and lambda makes their rounding larger


def one_edit(pipe: Any, runs: int) -> Iterator[Figure]:
    """Text to weights written."""
    editor = Editor(pipe)
    check(pipe, VAN_GOGH, "last_to_end")
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        edit = editor.edit(VAN_GOGH)
        edit.apply_(pipe)
        seconds.append(time.perf_counter() - start)
        edit.revert_(pipe)
    yield Figure(
        "one edit, text to weights written, CLIP-L size",
        median(seconds[1:]),
        "<= 0.3",
        "s",
        f"{_cores()}; {_between(seconds[1:])}",
    )


def many_edits(pipe: Any, runs: int) -> Iterator[Figure]:
    """A thousand concepts at once, four templates a side, no prompt twice."""
    editor = Editor(pipe)
    editor.edit(VAN_GOGH)  # warm
    for tokens, limit in LIMITS.items():
        worst = check(pipe, phrase_pairs(20), tokens)
        seconds = []
        for _ in range(runs):
            gc.collect()
            start = time.perf_counter()
            edit = editor.edit(phrase_pairs(MANY), tokens=tokens)
            edit.apply_(pipe)
            seconds.append(time.perf_counter() - start)
            edit.revert_(pipe)
        yield Figure(
            f"{MANY:,} concepts jointly, tokens='{tokens}'",
            median(seconds),
            f"<= {limit:g}",
            "s",
            f"{8 * MANY:,} distinct prompts; {_cores()}; {_between(seconds)}; of 20 concepts the "
            f"change is within {worst:.0e} of the formula's",
        )
        few, many = (_peak_in_fresh_process(tokens, number) / 2**20 for number in (FEW, MANY))
        kept = _pairs(pipe, tokens) * 2 * out_proj(pipe).in_features * 8 / 2**20
        name = f"peak memory over the loaded model's, tokens='{tokens}'"
        yield Figure(
            f"{name}: {MANY:,} concepts",
            many,
            "",
            "MiB",
            f"all pairs in float64 would be {kept:,.0f} MiB; a matrix of 768 x 768 is 4.5 MiB",
        )
        yield Figure(
            f"{name}: {MANY:,} concepts over {FEW}",
            many / few,
            "<= 1.25",
            "times",
            f"{few:.0f} MiB for {FEW}",
        )


def _pairs(pipe: Any, tokens: Tokens) -> int:
    pairs = parse_replacements(phrase_pairs(MANY), empty_new=False)
    return collect(Model(pipe).encoders[0], pairs, TEMPLATES, tokens).pairs


# ---- no green, no number


def check(pipe: Any, pairs: Sequence[tuple[str, str]], tokens: Tokens) -> float:
    """The relative error of the edit of `pairs` against the formula.

    Keys and goals are read from whole padded prompts, the paper's d x d system is solved in
    float64. Raises `RuntimeError` where they differ.
    """
    keys, goals = (_read(pipe, side, tokens) for side in zip(*pairs, strict=True))
    if tokens == "last_to_end":  # as long as the later of the two lasts
        cut = [min(len(k), len(g)) for k, g in zip(keys, goals, strict=True)]
        keys, goals = ([r[:n] for r, n in zip(s, cut, strict=True)] for s in (keys, goals))
    key, goal = torch.cat(keys), torch.cat(goals)
    edit = Editor(pipe).edit(pairs, tokens=tokens)
    weight = out_proj(pipe).weight.detach().double()
    system = key.mT @ key + edit.manifest["lam"] * torch.eye(key.shape[-1], dtype=torch.float64)
    right = torch.linalg.solve(system, key.mT @ (goal - key) @ weight.mT).mT
    error = float((_change(edit) - right).norm() / right.norm())
    if not error <= SAME:
        raise RuntimeError(f"The edit with tokens={tokens!r} is off by {error:.1e} of the change.")
    return error


def _change(edit: Edit) -> Tensor:
    return edit.changes[MATRIX].dense


def _read(pipe: Any, phrases: Sequence[str], tokens: Tokens) -> list[Tensor]:
    """Inputs of whole padded prompts from the phrase's last token on, [n, 768] a prompt."""
    seen: list[Tensor] = []
    handle = out_proj(pipe).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    prompts = [template.format(phrase) for phrase in phrases for template in TEMPLATES]
    with torch.no_grad():
        pipe.encode_prompt(prompts, "cpu", 1, False)
    handle.remove()
    ends = [len(pipe.tokenizer(prompt).input_ids) - 2 for prompt in prompts]
    stops = [end + 1 if tokens == "last" else pipe.tokenizer.model_max_length for end in ends]
    return [rows[a:b].double() for rows, a, b in zip(seen[0], ends, stops, strict=True)]


# ---- memory


def _peak_in_fresh_process(tokens: Tokens, number: int) -> int:
    """Bytes."""
    script = Path(__file__).with_name("closed_form.py")
    done = subprocess.run(
        [sys.executable, str(script), "--peak", tokens, str(number)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout.splitlines()[-1])


def peak(pipe: Any, tokens: Tokens, number: int) -> int:
    """Peak resident bytes of an edit over the loaded model's, in this process (Linux)."""
    editor, pairs = Editor(pipe), phrase_pairs(number)
    editor.edit(VAN_GOGH)  # code imported on first use is no memory of an edit's
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # pages that the allocator holds would not count
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _status("VmRSS")
    editor.edit(pairs, tokens=tokens)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes, by /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def _cores() -> str:
    return f"{os.cpu_count()} cores"


def _between(seconds: Sequence[float]) -> str:
    return f"{len(seconds)} runs, {min(seconds):.3g} to {max(seconds):.3g} s"
