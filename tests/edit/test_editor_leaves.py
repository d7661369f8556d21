"""What making an edit leaves behind: an untouched pipeline, and a manifest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fasttrace_by_formula import CALLS, MID, PAIRS, TEMPLATES, pairs_for

from fasttrace import Editor, Replacement
from fasttrace.edit.methods import METHODS
from fasttrace.errors import UsageError
from fasttrace.testing import tiny_pipeline


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
