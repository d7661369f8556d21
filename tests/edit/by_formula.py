"""Edits by the words of the paper: what whole padded prompts give, in float64, and the formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttrace import Replacement
from fasttrace.edit.edit import Edit
from fasttrace.testing.tiny import WINDOW

PAIRS = [("big dog", "cat")]
MID = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
CALLS: dict[str, dict[str, Any]] = {
    "diffquickfix": {},
    "mlp": {"method": "mlp"},
    "uce": {"method": "uce"},
    "time": {"method": "time"},
    "locoedit": {"site": MID},
}
TEMPLATES = ("{}", "a photo of {}", "an image of {}", "a picture of {}")
WIDE = torch.float64


@dataclass
class Learnt:
    """A pair of rows: where its key is read, what it is to read like, [(prompt, place, share)]."""

    prompt: str
    place: int
    goal: list[tuple[str, int, float]]


def end_of(pipe: Any, text: str) -> int:
    """Position of the last token of a text that a prompt begins with."""
    return len(pipe.tokenizer(text).input_ids) - 2


def learnt(
    pipe: Any, pairs: Sequence[Any], templates: Sequence[str] = TEMPLATES, tokens: str = ""
) -> list[Learnt]:
    """By the words of the paper: from each phrase's last token on, both sides their own."""
    found = []
    for old, news, strength, shares in map(spelt, pairs):
        for template in templates:
            before = template[: template.index("{}")]
            prompt, at = template.replace("{}", old), end_of(pipe, before + old)
            ends = [(template.replace("{}", n), end_of(pipe, before + n)) for n in news]
            if news == ("",):
                ends = [("", 0)]
            most = WINDOW - max([at, *(e for _, e in ends)])
            for i in range(1 if tokens == "last" else most):
                goal = [(p, e + i, strength * s) for (p, e), s in zip(ends, shares, strict=True)]
                goal += [(prompt, at + i, 1 - strength)] if strength != 1 else []
                found.append(Learnt(prompt, at + i, goal))
    return found


def spelt(pair: Any) -> tuple[str, tuple[str, ...], float, tuple[float, ...]]:
    if not isinstance(pair, Replacement):
        return pair[0], (pair[1],), 1.0, (1.0,)
    news = (pair.new,) if isinstance(pair.new, str) else tuple(pair.new)
    weights = pair.weights or (1.0,) * len(news)
    return pair.old, news, pair.strength, tuple(w / sum(weights) for w in weights)


def kept(pipe: Any, phrases: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[Learnt]:
    found = []
    for phrase in phrases:
        for template in templates:
            prompt = template.replace("{}", phrase)
            start = end_of(pipe, template[: template.index("{}")] + phrase)
            found += [Learnt(prompt, i, [(prompt, i, 1.0)]) for i in range(start, WINDOW)]
    return found


def aligned(pipe: Any, old: str, new: str) -> list[Learnt]:
    """One word for one word: every token but that word's, and all padding."""
    ids, others = (pipe.tokenizer(t).input_ids for t in (old, new))
    assert len(ids) == len(others)
    same = [i for i in range(WINDOW) if i >= len(ids) or ids[i] == others[i]]
    return [Learnt(old, i, [(new, i, 1.0)]) for i in same]


class Rows:
    """What one layer reads and gives at learnt tokens, by whole padded runs."""

    def __init__(self, slow: Any, pipe: Any, name: str, pairs: Sequence[Learnt]) -> None:
        self.slow, self.pipe, self.name, self.pairs = slow, pipe, name, pairs
        prompts = [*(p.prompt for p in pairs), *(g for p in pairs for g, _, _ in p.goal)]
        self.prompts = list(dict.fromkeys(prompts))
        module = slow.module(pipe, name)
        self.weight = module.weight.detach().clone()
        self.bias = None if module.bias is None else module.bias.detach().clone()
        number = {p: i for i, p in enumerate(self.prompts)}
        self.at = [number[p.prompt] for p in pairs], [p.place for p in pairs]
        ins, outs = slow.read(pipe, [name], self.prompts)[name]
        self.keys, self.outputs = ins[self.at], outs[self.at]

        def mean(rows: Tensor, goal: list[tuple[str, int, float]]) -> Tensor:
            return torch.stack([share * rows[number[p], at] for p, at, share in goal]).sum(0)

        self.goals = torch.stack([mean(ins, p.goal) for p in pairs])
        self.values = torch.stack([mean(outs, p.goal) for p in pairs])  # v: with the bias

    def read(self) -> tuple[Tensor, Tensor]:
        """Inputs and outputs at the keys' places, of the pipeline as it is now."""
        ins, outs = self.slow.read(self.pipe, [self.name], self.prompts)[self.name]
        return ins[self.at], outs[self.at]

    def by_formula(self, lam: float, bias: str = "exact", weights: Tensor | None = None) -> Tensor:
        """(lam W0 + V K^T) (lam I + K K^T)^-1, keys and values as columns."""
        b = 0 if self.bias is None or bias == "as_released" else self.bias
        w = torch.ones(len(self.keys), dtype=WIDE) if weights is None else weights
        k, v = (self.keys * w[:, None].sqrt()).T, ((self.values - b) * w[:, None].sqrt()).T
        system = lam * torch.eye(len(k), dtype=WIDE) + k @ k.T
        new: Tensor = torch.linalg.solve(system, (lam * self.weight + v @ k.T).T).T
        return new

    def left_by_formula(self, lam: float, bias: str = "exact") -> Tensor:
        """lam (lam I + G)^-1 R, plus the bias that was asked for too much."""
        extra = self.bias if bias == "as_released" else 0 * self.values[0]
        residual = self.values - self.outputs + extra
        gram = self.keys @ self.keys.T + lam * torch.eye(len(self.keys), dtype=WIDE)
        return lam * torch.linalg.solve(gram, residual) - extra


def assert_change(edit: Edit, rows: Rows, expected: Tensor, lam: float) -> None:
    found = edit.changes[rows.name].dense
    wanted = expected - rows.weight
    # Rounding in float64, as often as the system's condition magnifies it.
    condition = float(rows.keys.square().sum() + lam) / lam
    worst = 1e-14 * condition * float(wanted.norm())
    assert float((found - wanted).norm()) <= worst + 1e-13 * float(rows.weight.norm())
    assert float(wanted.norm()) > 1e-2


def assert_near(found: Tensor, expected: Tensor, digits: float = 1e-10) -> None:
    assert float((found - expected).norm()) <= digits * float(expected.norm())


def same_changes(one: Edit, other: Edit, digits: float = 1e-10) -> None:
    assert list(one.changes) == list(other.changes)
    for name, change in one.changes.items():
        assert_near(change.dense, other.changes[name].dense, digits)


def places_of(pipe: Any, method: str, pairs: Sequence[Any] = PAIRS) -> list[Learnt]:
    if method == "time":
        found = []
        for old, new in pairs:
            found += aligned(pipe, old, new)
        return found
    return learnt(pipe, pairs)


def pairs_for(method: str) -> list[tuple[str, str]]:
    return [("a big dog", "a big cat")] if method == "time" else PAIRS


def names_of(pipe: Any, method: str) -> list[str]:
    """Of the matrices that a method edits, by hand."""
    encoders = ["text_encoder", *(["text_encoder_2"] if hasattr(pipe, "text_encoder_2") else [])]
    if method in ("diffquickfix", "mlp"):
        part = {"diffquickfix": "self_attn.out_proj", "mlp": "mlp.fc2"}[method]
        return [f"{e}.layers.0.{part}" for e in encoders]
    if method == "locoedit":
        return [f"{MID}.to_k", f"{MID}.to_v"]
    names = [n for n, _ in pipe.unet.named_modules() if n.endswith("attn2")]
    names.sort(key=lambda n: ("down", "mid", "up").index(n.split("_")[0]))
    return [f"unet.{n}.{part}" for n in names for part in ("to_k", "to_v")]


class biases:
    """Biases that are not zero, as a trained model's; put back afterwards."""

    def __init__(self, pipe: Any, names: Sequence[str], slow: Any) -> None:
        self.layers = [slow.module(pipe, n) for n in names]

    def __enter__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.before = [layer.bias.detach().clone() for layer in self.layers]
        with torch.no_grad():
            for layer in self.layers:
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))

    def __exit__(self, *_: Any) -> None:
        with torch.no_grad():
            for layer, bias in zip(self.layers, self.before, strict=True):
                layer.bias.copy_(bias)
