"""Every method against the paper's formula, on what whole padded prompts give (float64)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fasttrace_by_formula import (
    CALLS,
    PAIRS,
    WIDE,
    Rows,
    assert_change,
    assert_near,
    biases,
    kept,
    learnt,
    names_of,
    pairs_for,
    places_of,
    same_changes,
)

from fasttrace import Editor, Replacement
from fasttrace.edit.methods import METHODS


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
