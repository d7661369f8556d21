"""How exact the closed form is, on the inputs of an encoder of CLIP-L's size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from concepts import phrase_pairs
from figures import Figure
from torch import Tensor, nn

from fasttrace import Editor
from fasttrace.adapters.pipeline import Model
from fasttrace.edit.inputs import read_text
from fasttrace.edit.phrases import TEMPLATES, Tokens, collect, parse_replacements
from fasttrace.edit.solver import Moments, solve, solve_moments

SITE = "text_encoder.layers.0.self_attn"
MATRIX = f"{SITE}.out_proj"
SIZES = (1, 4, 77, 291, 768, 2000)
LAMBDAS = (1e-3, 1e-2, 1.0, 1e2)
EPS = 2.2e-16
WIDE = torch.float64
VAN_GOGH = [("van gogh", "painting")]


def out_proj(pipe: Any) -> nn.Linear:
    return pipe.text_encoder.encoder.layers[0].self_attn.out_proj


def inputs(pipe: Any, pairs: Sequence[tuple[str, str]], tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Keys and goals [n, 768], float64, all of them, however many."""
    model, found = Model(pipe), ([], [])
    for start in range(0, len(pairs), 2):  # few enough that single pairs are kept, not their sums
        facts = collect(
            model.encoders[0],
            parse_replacements(pairs[start : start + 2], empty_new=False),
            TEMPLATES,
            tokens,
        )
        with torch.no_grad():
            read = read_text(model.encoders[0], {MATRIX: out_proj(pipe)}, facts, 1.0)[MATRIX]
        for kept, rows in zip(found, (read.keys, read.goals), strict=True):
            kept.extend(rows)
    return torch.cat(found[0]), torch.cat(found[1])


# ---- 1: against a dense solve


def against_dense(pipe: Any) -> Iterator[Figure]:
    """The change against the paper's d x d system, solved by LU in float64."""
    weight = out_proj(pipe).weight.detach().to(WIDE)
    for name, keys, goals in _cases(pipe):
        equations = 0.0
        for n in SIZES:
            some = _spread(n, len(keys))
            worst: tuple[float, float, float] = (-1.0, 1.0, 0.0)
            for lam in LAMBDAS:
                error, allowed, residual = _compare(keys[some], goals[some], weight, lam)
                worst = max(worst, (error, allowed, lam), key=lambda w: w[0] / w[1])
                equations = max(equations, residual)
            error, allowed, lam = worst
            yield Figure(
                f"change against a dense float64 solve, {name}, {n} pairs",
                error,
                f"<= {allowed:.1e}",
                note=f"relative; lam {lam:g} is nearest to what is allowed",
            )
        yield Figure(f"normal equations, {name}", equations, "<= 1e-11", note="of all of these")


def _compare(keys: Tensor, goals: Tensor, weight: Tensor, lam: float) -> tuple[float, float, float]:
    """(relative error of the change, what is allowed, error of the normal equations)."""
    residuals = (goals - keys) @ weight.mT
    gram, wanted = keys.mT @ keys, residuals.mT @ keys
    system = gram + lam * torch.eye(len(gram), dtype=WIDE)
    dense = torch.linalg.solve(system, wanted.mT).mT
    found = [solve(keys, residuals, lam).dense]
    if len(keys) > keys.shape[-1]:  # the editor itself keeps sums there
        moments = Moments.zero(keys.shape[-1], keys.device)
        moments.add_(keys, goals)
        found.append(solve_moments(moments, [lam])[0].of(weight).dense)
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    condition = float((values[-1] + lam) / (values[0] + lam))
    error = max(_relative(each, dense) for each in found)
    equations = max(_relative(each @ system, wanted) for each in found)
    return error, max(1e-9, condition * EPS), equations


def _cases(pipe: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    most = max(SIZES)
    pairs = phrase_pairs(most // len(TEMPLATES))
    yield "last tokens of distinct prompts", *inputs(pipe, pairs, "last")
    keys, goals = inputs(pipe, pairs[:16], "last_to_end")
    yield "every position up to the end", keys[:most], goals[:most]
    random = torch.Generator().manual_seed(0)
    shared, one, other = (
        torch.randn(rows, keys.shape[-1], generator=random, dtype=WIDE) for rows in (1, most, most)
    )
    scale = float(keys.std())
    yield (
        "synthetic, correlation 0.9999",
        scale * (shared + 0.01 * one),
        scale * (shared + 0.01 * other),
    )


def _spread(n: int, of: int) -> Tensor:
    return torch.arange(n) * of // n


def _relative(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


# ---- 2 and 3: the released settings


def released(pipe: Any) -> Iterator[Figure]:
    """ "van gogh" -> "painting" with the released settings; what bias does to it."""
    editor = Editor(pipe)
    edit = editor.edit(VAN_GOGH)
    keys, goals = inputs(pipe, VAN_GOGH, "last_to_end")
    yield Figure("pairs, 'van gogh' -> 'painting', four templates", len(keys), "= 291")
    yield Figure("parameters touched", edit.parameters, "= 589,824")
    yield Figure(
        "inputs read, against whole padded prompts",
        _inputs_error(pipe, keys),
        "<= 1e-5",
        note="relative, float32",
    )
    lam = float(edit.manifest["lam"])
    weight = out_proj(pipe).weight.detach().to(WIDE)
    bias = out_proj(pipe).bias.detach().to(WIDE)
    pull = _refined(keys, lam)
    twice = (goals - keys) @ weight.mT + bias
    counted = editor.edit(VAN_GOGH, bias="as_released").changes[MATRIX].dense
    yield Figure(
        "bias='as_released' against the formula with the bias counted twice",
        _relative(counted, twice.mT @ pull),
        "<= 1e-12",
        note="relative; the formula refined in extended precision",
    )
    residuals = (goals - keys) @ weight.mT
    left = residuals - keys @ edit.changes[MATRIX].dense.mT
    system = keys @ keys.mT + lam * torch.eye(len(keys), dtype=WIDE)
    remains = lam * torch.linalg.solve(system, residuals)
    yield Figure(
        "bias='exact' leaves lam R (lam I + G)^-1 of the residual R",
        _relative(left, remains),
        "<= 1e-10",
        note=f"relative; that is {float(remains.norm() / residuals.norm()):.1e} of R",
    )


def _refined(keys: Tensor, lam: float) -> Tensor:
    """(lam I + K K^T)^-1 K [n, d] by LU, refined until it is right to the last digits."""
    wide = keys.numpy().astype(np.longdouble)
    system = wide @ wide.T + np.longdouble(lam) * np.eye(len(wide), dtype=np.longdouble)
    factors = torch.linalg.lu_factor(torch.from_numpy(system.astype(np.float64)))
    found = np.zeros_like(wide)
    for _ in range(4):
        rest = torch.from_numpy((wide - system @ found).astype(np.float64))
        found = found + torch.linalg.lu_solve(*factors, rest).numpy()
    return torch.from_numpy(found.astype(np.float64))


def _inputs_error(pipe: Any, keys: Tensor) -> float:
    """Of keys [291, 768] in the editor's order: template by template, to the end."""
    seen: list[Tensor] = []
    handle = out_proj(pipe).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    prompts = [template.format("van gogh") for template in TEMPLATES]
    with torch.no_grad():
        pipe.encode_prompt(prompts, "cpu", 1, False)
    handle.remove()
    ends = [len(pipe.tokenizer(prompt).input_ids) - 2 for prompt in prompts]
    window = pipe.tokenizer.model_max_length
    whole = torch.cat([rows[end:window] for rows, end in zip(seen[0], ends, strict=True)])
    return _relative(keys, whole.to(WIDE))
