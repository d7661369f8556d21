"""Every method against the paper's formula, on what whole padded prompts give (float64)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttrace import Editor, Replacement
from fasttrace.edit.edit import Edit
from fasttrace.edit.methods import METHODS
from fasttrace.errors import FasttraceError, ModelError, UsageError
from fasttrace.testing import tiny_pipeline
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


class TestMethods:
    @pytest.mark.parametrize("method", CALLS)
    def test_the_change_is_the_formula_and_outputs_are_what_was_asked_for(
        self, own, family, slow, method
    ):
        pipe = own(family, WIDE)
        pairs = pairs_for(method)
        edit = Editor(pipe).edit(pairs, **CALLS[method])
        assert list(edit.changes) == names_of(pipe, method)
        lam = METHODS[method].lam
        assert edit.manifest["lam"] == lam
        everything = {n: Rows(slow, pipe, n, places_of(pipe, method, pairs)) for n in edit.changes}
        for rows in everything.values():
            assert_change(edit, rows, rows.by_formula(lam), lam)
        with edit.applied(pipe):
            for rows in everything.values():
                keys, outputs = rows.read()
                assert_near(keys, rows.keys, 1e-14)  # no edited layer lies below another
                left = rows.values - outputs
                assert_near(left, rows.left_by_formula(lam), 1e-8)
                assert float(left.norm()) < 0.7 * float((rows.values - rows.outputs).norm())

    @pytest.mark.parametrize("method", ["diffquickfix", "mlp"])
    @pytest.mark.parametrize("tokens", ["last", "last_to_end"])
    def test_as_released_counts_the_bias_twice(self, own, family, slow, method, tokens):
        pipe = own(family, WIDE)
        call: dict[str, Any] = {**CALLS[method], "lam": 0.05, "tokens": tokens}
        with biases(pipe, names_of(pipe, method), slow):
            edit = Editor(pipe).edit(PAIRS, bias="as_released", **call)
            exact = Editor(pipe).edit(PAIRS, **call)
            for name in edit.changes:
                rows = Rows(slow, pipe, name, learnt(pipe, PAIRS, tokens=tokens))
                assert_change(edit, rows, rows.by_formula(0.05, "as_released"), 0.05)
                assert_change(exact, rows, rows.by_formula(0.05), 0.05)
                released = edit.changes[name].dense
                assert float((released - exact.changes[name].dense).norm()) > 0.1
                with edit.applied(pipe):
                    _, outputs = rows.read()
                left = rows.values - outputs
                assert_near(left, rows.left_by_formula(0.05, "as_released"), 1e-8)

    def test_as_released_is_exact_where_there_is_no_bias(self, own):
        editor = Editor(own("sd", WIDE))
        same_changes(
            editor.edit(PAIRS, method="uce", bias="as_released"), editor.edit(PAIRS, method="uce")
        )

    @pytest.mark.parametrize("method", ["diffquickfix", "uce"])
    @pytest.mark.parametrize(
        "pair",
        [
            Replacement("big dog", "cat", strength=0.5),
            Replacement("big dog", "cat", strength=2),
            Replacement("dog", ("cat", "blue car", "house"), weights=(1, 2, 3)),
            Replacement("dog", ("red cat", "blue car"), strength=0.25),
        ],
    )
    def test_strength_and_several_targets(self, own, slow, method, pair):
        pipe = own("sd", WIDE)
        edit = Editor(pipe).edit([pair, ("red", "blue")], lam=0.1, **CALLS[method])
        for name in list(edit.changes)[:2]:
            rows = Rows(slow, pipe, name, learnt(pipe, [pair, ("red", "blue")]))
            assert_change(edit, rows, rows.by_formula(0.1), 0.1)

    def test_the_empty_text_as_a_target(self, own, family, slow):
        pipe = own(family, WIDE)
        edit = Editor(pipe).edit([("big dog", "")], method="uce")
        for name in list(edit.changes)[:2]:
            rows = Rows(slow, pipe, name, learnt(pipe, [("big dog", "")]))
            assert_change(edit, rows, rows.by_formula(0.1), 0.1)

    @pytest.mark.parametrize("method", ["diffquickfix", "uce"])
    def test_a_strength_of_half_is_half_the_change(self, own, method):
        editor = Editor(own("sd", WIDE))
        half = editor.edit([Replacement("dog", "cat", 0.5)], **CALLS[method])
        whole = editor.edit([("dog", "cat")], **CALLS[method])
        for name, change in whole.changes.items():
            assert_near(half.changes[name].dense, change.dense / 2)

    def test_templates(self, own, slow):
        pipe = own("sd", WIDE)
        templates = ["{} in the house", "the {}, red"]
        edit = Editor(pipe).edit(PAIRS, templates=templates)
        [name] = edit.changes
        rows = Rows(slow, pipe, name, learnt(pipe, PAIRS, templates))
        assert_change(edit, rows, rows.by_formula(0.01), 0.01)
        assert edit.manifest["templates"] == templates

    @pytest.mark.parametrize("layer", [0, 1, 2])
    @pytest.mark.parametrize("part", ["self_attn", "mlp"])
    def test_any_layer(self, own, slow, layer, part):
        pipe = own("sd", WIDE)
        edit = Editor(pipe).edit(PAIRS, site=f"text_encoder.layers.{layer}.{part}")
        assert edit.manifest["method"] == {"self_attn": "diffquickfix", "mlp": "mlp"}[part]
        [name] = edit.changes
        rows = Rows(slow, pipe, name, learnt(pipe, PAIRS))
        assert_change(edit, rows, rows.by_formula(0.01), 0.01)

    def test_an_edit_in_float32_is_near(self, own, family):
        for method, call in CALLS.items():
            wide = Editor(own(family, WIDE)).edit(pairs_for(method), lam=1.0, **call)
            narrow = Editor(own(family)).edit(pairs_for(method), lam=1.0, **call)
            same_changes(narrow, wide, 1e-4)


class TestPreserve:
    @pytest.mark.parametrize("method", ["diffquickfix", "mlp", "uce"])
    @pytest.mark.parametrize("weight", [1.0, 50.0])
    def test_by_formula(self, own, slow, method, weight):
        pipe = own("sd", WIDE)
        edit = Editor(pipe).edit(
            PAIRS, lam=0.1, preserve=["style", "red car"], preserve_weight=weight, **CALLS[method]
        )
        own_pairs, kept_pairs = learnt(pipe, PAIRS), kept(pipe, ["style", "red car"])
        weights = torch.tensor([1.0] * len(own_pairs) + [weight] * len(kept_pairs), dtype=WIDE)
        for name in edit.changes:
            rows = Rows(slow, pipe, name, own_pairs + kept_pairs)
            assert_change(edit, rows, rows.by_formula(0.1, weights=weights), 0.1)

    def test_any_iterable(self, own):
        editor = Editor(own("sd"))
        edit = editor.edit(PAIRS, preserve=iter(["style", "red"]))
        assert edit.manifest["preserve"] == ["style", "red"]
        same_changes(edit, editor.edit(PAIRS, preserve=["style", "red"]))

    def test_outputs_stay(self, own, slow):
        """With one token a phrase there is room for both."""
        pipe = own("sd", WIDE)
        call: dict[str, Any] = {"tokens": "last", "templates": ["{}"], "lam": 1e-3}
        moved = []
        for options in ({}, {"preserve": ["style", "red car"], "preserve_weight": 1e4}):
            edit = Editor(pipe).edit(PAIRS, **call, **options)
            [name] = edit.changes
            places = kept(pipe, ["style", "red car"], ["{}"])
            first = {p.prompt: p for p in reversed(places)}
            rows = Rows(slow, pipe, name, list(first.values()))
            asked = Rows(slow, pipe, name, learnt(pipe, PAIRS, ["{}"], "last"))
            with edit.applied(pipe):
                moved.append(float((rows.read()[1] - rows.outputs).norm()))
                left = asked.values - asked.read()[1]
            assert float(left.norm()) < 0.2 * float((asked.values - asked.outputs).norm())
        assert moved[1] < 1e-3 * moved[0]


class TestSeveralAtOnce:
    LISTS = (
        [("dog", "cat")],
        [("big red dog", "house"), ("car", "blue painting")],
        [Replacement("style", ("red", "blue"), 0.5)],
    )

    @pytest.mark.parametrize(
        ("method", "lam"),
        [("diffquickfix", 0.1), ("mlp", 0.1), ("uce", 0.1), ("locoedit", 0.1), ("diffquickfix", 0)],
    )
    @pytest.mark.parametrize("tokens", ["last", "last_to_end"])
    def test_each_is_one_by_one(self, own, method, tokens, lam):
        """last: pairs of different numbers in one padded batch; last_to_end: sums."""
        editor = Editor(own("sd", WIDE))
        call = {**CALLS[method], "tokens": tokens, "lam": lam}
        together = editor.edit_each(self.LISTS, **call)
        assert len(together) == 3
        for pairs, edit in zip(self.LISTS, together, strict=True):
            alone = editor.edit(pairs, **call)
            same_changes(edit, alone, 1e-8)
            assert edit.manifest == alone.manifest

    @pytest.mark.parametrize("family", ["sdxl"])
    def test_each_on_two_encoders(self, own, family):
        editor = Editor(own(family, WIDE))
        for pairs, edit in zip(
            self.LISTS, editor.edit_each(self.LISTS, tokens="last"), strict=True
        ):
            assert list(edit.changes) == names_of(own(family), "diffquickfix")
            same_changes(edit, editor.edit(pairs, tokens="last"))

    def test_pairs_kept_beside_sums(self, own):
        """Four pairs, and more than there are inputs, in one call."""
        editor = Editor(own("sd", WIDE))
        words = ("dog", "cat", "car", "house", "style")
        many = [(f"{w} of {v}", "tiny") for w in words for v in words if v != w]
        lists = [[("dog", "cat")], many, [("red", "blue")]]
        for pairs, edit in zip(lists, editor.edit_each(lists, tokens="last"), strict=True):
            same_changes(edit, editor.edit(pairs, tokens="last"))
        assert edit.manifest["pairs"][0]["old"] == "red"

    def test_nothing_at_all(self, own):
        assert Editor(own("sd")).edit_each([]) == []
        with pytest.raises(UsageError, match="lams is empty"):
            Editor(own("sd")).path(PAIRS, [])
        with pytest.raises(UsageError, match="pairs is empty"):
            Editor(own("sd")).edit_each([PAIRS, []])

    @pytest.mark.parametrize("method", CALLS)
    @pytest.mark.parametrize("tokens", ["last", "last_to_end"])
    def test_path_is_one_by_one(self, own, method, tokens):
        editor = Editor(own("sd", WIDE))
        call = {**CALLS[method], "tokens": tokens}
        lams = [1e-3, 0.01, None, 10.0]
        found = editor.path(PAIRS, lams, bias="as_released", **call)
        for lam, edit in zip(lams, found, strict=True):
            same_changes(edit, editor.edit(PAIRS, lam=lam, bias="as_released", **call), 1e-8)
            assert edit.manifest["lam"] == (METHODS[method].lam if lam is None else lam)

    def test_lambda_moderates(self, own):
        found = Editor(own("sd", WIDE)).path(PAIRS, [1e-3, 0.1, 10.0])
        sizes = [float(e.changes["text_encoder.layers.0.self_attn.out_proj"].dense.norm())
                 for e in found]  # fmt: skip
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] > 2 * sizes[2]


class TestAfter:
    @pytest.mark.parametrize("method", ["diffquickfix", "uce"])
    def test_on_top_of_another(self, own, slow, method):
        pipe = own("sd", WIDE)
        editor = Editor(pipe)
        before = slow.state(pipe)
        first = editor.edit(PAIRS, **CALLS["diffquickfix"])
        second = editor.edit([("red car", "house")], after=first, **CALLS[method])
        assert slow.state(pipe) == before
        with first.applied(pipe):
            apart = Editor(pipe).edit([("red car", "house")], **CALLS[method])
            with apart.applied(pipe):
                expected = {n: slow.module(pipe, n).weight.detach().clone() for n in second.changes}
        assert set(second.changes) == set(first.changes) | set(apart.changes)
        with second.applied(pipe):
            for name, weight in expected.items():
                assert_near(slow.module(pipe, name).weight.detach(), weight, 1e-13)
        assert slow.state(pipe) == before
        [made] = second.manifest["after"]
        assert made == first.manifest
        third = editor.edit([("style", "blue")], after=second, **CALLS[method])
        assert [m["pairs"] for m in third.manifest["after"]] == [
            m.manifest["pairs"] for m in (first, second)
        ]
        with third.applied(pipe):
            pass

    def test_a_strange_one_is_refused_and_leaves_nothing(self, own, slow):
        pipe = own("sd", WIDE)
        other = Editor(tiny_pipeline("sd", seed=1).to(WIDE)).edit(PAIRS)
        before = slow.state(pipe)
        with pytest.raises(ModelError, match="made on other weights"):
            Editor(pipe).edit(PAIRS, after=other)
        first = Editor(pipe).edit(PAIRS)
        with pytest.raises(UsageError, match="empty"):
            Editor(pipe).edit([], after=first)
        assert slow.state(pipe) == before


class TestThePipelineIsUntouched:
    @pytest.mark.parametrize("method", CALLS)
    def test_by_making_an_edit(self, family, slow, method):
        pipe = tiny_pipeline(family)
        pipe.unet.train()
        pipe.text_encoder.encoder.layers[1].train()
        pipe.vae.requires_grad_(False)

        def everything() -> Any:
            modules = [
                (n, m.training, list(m._forward_hooks), list(m._forward_pre_hooks))
                for part in (pipe.unet, pipe.text_encoder, pipe.vae)
                for n, m in part.named_modules()
            ]
            tensors = [
                (n, id(p), p._version, p.requires_grad)
                for part in (pipe.unet, pipe.text_encoder, pipe.vae)
                for n, p in part.named_parameters()
            ]
            return modules, tensors, slow.state(pipe), torch.get_rng_state().tolist()

        before = everything()
        editor = Editor(pipe)
        editor.edit(pairs_for(method), **CALLS[method])
        editor.path(pairs_for(method), [0.1, 1.0], **CALLS[method])
        for lam, words in ((-1, "lam is -1"), ("1", "lam is '1'")):
            with pytest.raises(UsageError, match=words):
                editor.edit(pairs_for(method), lam=lam, **CALLS[method])
        assert everything() == before
        assert torch.is_grad_enabled()

    def test_an_edit_with_gradients_on_keeps_no_graph(self, own):
        edit = Editor(own("sd")).edit(PAIRS)
        for change in edit.changes.values():
            assert not change.left.requires_grad
            assert not change.right.requires_grad


class TestManifest:
    def test_all_that_determines_it(self, own, slow):
        pipe = own("sd")
        pair = Replacement("dog", ("cat", "car"), 0.5, (1.0, 3.0))
        edit = Editor(pipe).edit([pair], method="uce", preserve=["red", "red"], preserve_weight=2)
        m = edit.manifest
        assert m["pairs"] == [
            {"old": "dog", "new": ["cat", "car"], "strength": 0.5, "shares": [0.25, 0.75]}
        ]
        assert (m["preserve"], m["preserve_weight"]) == (["red"], 2.0)
        assert (m["method"], m["source"]) == ("uce", METHODS["uce"].source)
        assert (m["tokens"], m["bias"], m["dtype"]) == ("last_to_end", "exact", "float32")
        assert (m["templates"], m["after"], m["lam"]) == (list(TEMPLATES), [], 0.1)
        assert list(m["base"]) == list(edit.changes)
        assert len(m["sites"]) == 4
        assert edit.parameters == sum(slow.module(pipe, n).weight.numel() for n in edit.changes)
        assert str(edit) == (
            f"uce of dog -> cat + car: 8 matrices, {edit.parameters:,} numbers, lam 0.1"
        )

    def test_the_method_follows_from_the_site(self, own):
        editor = Editor(own("sd"))
        assert editor.edit(PAIRS).manifest["method"] == "diffquickfix"
        assert editor.edit(PAIRS, site=MID).manifest["method"] == "locoedit"
        assert editor.edit(PAIRS, site=MID, method="time").manifest["tokens"] == "aligned"
        assert editor.edit(PAIRS, site="attn2").manifest["method"] == "locoedit"

    def test_long_lists_are_cut_short_in_words(self, own):
        pairs = [(w, "house") for w in ("dog", "cat", "car", "red", "blue")]
        assert "dog -> house, cat -> house, car -> house and 2 more:" in str(
            Editor(own("sd")).edit(pairs)
        )


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"method": "rome"}, "no method 'rome'; there are diffquickfix, mlp, uce, time, locoedit"),
    ({"method": "locoedit"}, "locoedit edits the cross-attention that tracing found: name it"),
    ({"method": "uce", "site": "attn"}, "uce edits sites of kind 'attn2'; text_encoder.layers.0"),
    ({"method": "mlp", "site": "attn"}, "For that, use diffquickfix."),
    ({"method": "diffquickfix", "site": MID}, "For that, use uce or time or locoedit."),
    ({"site": "hidden"}, "diffquickfix edits sites of kind 'attn'; .* is of kind 'hidden'"),
    ({"site": ["attn", "mlp"]}, "diffquickfix edits sites of kind 'attn'; .* use mlp"),
    ({"site": "resnet"}, "is of kind 'resnet'"),
    ({"site": "attn1"}, "is of kind 'attn1'"),
    ({"site": "nowhere"}, "No site matches 'nowhere'"),
    ({"site": []}, "site list is empty"),
    ({"lam": -0.1}, "lam is -0.1; it has to be finite and not negative"),
    ({"lam": float("nan")}, "lam is nan; it has to be finite"),
    ({"lam": "0.1"}, "lam is '0.1'; it has to be a number"),
    ({"lam": True}, "lam is True; it has to be a number"),
    ({"lam": 0, "tokens": "last", "preserve": ["dog"]}, "With lam 0 the edit has no single answer"),
    ({"tokens": "all"}, "tokens is 'all'; expected one of last, last_to_end, aligned"),
    ({"templates": "{}"}, "templates is a list"),
    ({"templates": []}, "templates is empty"),
    ({"templates": ["a dog"]}, "needs one {}"),
    ({"bias": "twice"}, "bias is 'twice'; expected exact or as_released"),
    ({"bias": "as_released", "preserve": ["red"]}, "as_released' is the released method, which"),
    ({"preserve": "red"}, "preserve is a list of phrases"),
    ({"preserve": [3]}, "preserve is a list of phrases"),
    ({"preserve": None}, "preserve is a list of phrases"),
    ({"preserve": [""]}, "A phrase to preserve is empty"),
    ({"preserve_weight": 0}, "preserve_weight is 0; it has to be a number above 0"),
    ({"preserve_weight": -1.0}, "preserve_weight is -1.0"),
    ({"preserve_weight": float("nan")}, "preserve_weight is nan"),
    ({"preserve_weight": float("inf")}, "preserve_weight is inf"),
    ({"preserve_weight": "1"}, "preserve_weight is '1'"),
]


class TestRefused:
    @pytest.mark.parametrize(("options", "words"), WRONG)
    def test_wrong_calls(self, own, options, words):
        with pytest.raises(UsageError, match=words):
            Editor(own("sd")).edit([("dog", "cat")], **options)

    @pytest.mark.parametrize(
        ("pairs", "words"),
        [
            ([], "pairs is empty"),
            (("dog", "cat"), "this is none: 'dog'"),
            ("dog", "pairs is a list"),
            ([("dog", "")], "empty phrase, which has no token to read"),
            ([("dog", "dog")], "to become itself"),
            ([("dog", "cat"), ("dog", "car")], "to become both 'cat' and 'car'"),
            ([("red " * 30, "cat")], "tokens but the text window holds 22"),
        ],
    )
    def test_wrong_pairs(self, own, pairs, words):
        with pytest.raises(UsageError, match=words):
            Editor(own("sd")).edit(pairs)

    def test_no_pipeline(self):
        with pytest.raises(ModelError, match="is not a text-to-image pipeline"):
            Editor(object())

    @pytest.mark.parametrize("lams", [[0.01], [0.01, 0.1], [0], [0, 0.1]])
    @pytest.mark.parametrize("tokens", ["last", "last_to_end"])
    @pytest.mark.parametrize("method", ["diffquickfix", "uce"])
    def test_inputs_that_are_not_finite(self, method, tokens, lams):
        """Weights below the edited ones: what is read is NaN."""
        pipe = tiny_pipeline("sd")
        with torch.no_grad():
            pipe.text_encoder.encoder.layers[0].self_attn.v_proj.weight.fill_(float("nan"))
        with pytest.raises(ModelError, match="NaN"):
            Editor(pipe).path(PAIRS, lams, tokens=tokens, **CALLS[method])

    def broken(self, change: Callable[[Any], None], family: str = "sd") -> Any:
        pipe = tiny_pipeline(family)
        change(pipe)
        return pipe

    def test_models_that_cant_be_edited(self):
        def nan(pipe: Any) -> None:
            pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.data[0] = (
                float("inf")
            )

        def meta(pipe: Any) -> None:
            pipe.text_encoder.to("meta")

        def integers(pipe: Any) -> None:
            layer = pipe.text_encoder.encoder.layers[0].self_attn.out_proj
            layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)

        def tied(pipe: Any) -> None:
            layers = pipe.text_encoder.encoder.layers
            layers[1].self_attn.out_proj.weight = layers[0].self_attn.out_proj.weight

        for change, method, words in (
            (nan, "uce", "to_k holds NaN or infinite weights"),
            (lambda pipe: pipe.fuse_qkv_projections(), "uce", "reads its fused projections"),
            (meta, "diffquickfix", "on the meta device"),
            (integers, "diffquickfix", r"is quantised \(Linear of int8\)"),
            (tied, "diffquickfix", "is tied to another layer's"),
        ):
            with pytest.raises(ModelError, match=words):
                Editor(self.broken(change)).edit(PAIRS, **CALLS[method])

    def test_a_model_of_inference_tensors(self):
        with torch.inference_mode():
            pipe = tiny_pipeline("sd")
        with pytest.raises(FasttraceError, match="inference_mode"):
            Editor(pipe).edit(PAIRS)

    def test_a_lora_elsewhere_is_read_and_one_here_is_refused(self, slow):
        peft = pytest.importorskip("peft")
        pipe = tiny_pipeline("sd").to(WIDE)
        config = peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
        pipe.text_encoder.add_adapter(config)
        edit = Editor(pipe).edit(PAIRS)
        [name] = edit.changes
        rows = Rows(slow, pipe, name, learnt(pipe, PAIRS))
        assert_change(edit, rows, rows.by_formula(0.01), 0.01)
        pipe = tiny_pipeline("sd")
        pipe.text_encoder.add_adapter(peft.LoraConfig(target_modules=["out_proj"]))
        with pytest.raises(ModelError, match="carries an adapter"):
            Editor(pipe).edit(PAIRS)


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


def test_an_unknown_argument_is_named(sd):
    with pytest.raises(UsageError, match="argument 'lambda_'"):
        Editor(sd).edit([("dog", "cat")], lambda_=0.1)
