"""Several edits in one call, many lambdas, and one edit on top of another."""

from __future__ import annotations

import pytest
from fasttrace_by_formula import CALLS, PAIRS, WIDE, assert_near, names_of, same_changes

from fasttrace import Editor, Replacement
from fasttrace.edit.methods import METHODS
from fasttrace.errors import ModelError, UsageError
from fasttrace.testing import tiny_pipeline


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
