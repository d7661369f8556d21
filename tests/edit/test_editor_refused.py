"""Calls of the editor that are refused, and models that can't be edited."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fasttrace_by_formula import CALLS, MID, PAIRS, WIDE, Rows, assert_change, learnt
from torch import nn

from fasttrace import Editor
from fasttrace.edit.phrases import Replacement
from fasttrace.errors import FasttraceError, ModelError, UsageError
from fasttrace.testing import tiny_pipeline

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
    ({"site": 3}, "site is a site's name, a glob, or a list of these; 3 was given"),
    ({"site": ["attn", 3]}, "site is .*; 3 is in it"),
    ({"site": "\ud800"}, "No site matches"),
    ({"method": 3}, "no method 3|method is 3"),
    ({"tokens": 3}, "tokens is 3"),
    ({"bias": ["exact"]}, r"bias is \['exact'\]; expected exact or as_released"),
    ({"templates": 3}, "templates is a list, .*; 3 was given"),
    ({"templates": ["{} \udfff"]}, "no valid Unicode text"),
    ({"preserve": [["a"]]}, r"preserve is a list of phrases, .*; \['a'\] is in it"),
    ({"preserve": ["a\ud800"]}, "A text of preserve is .* no valid Unicode text"),
    ({"preserve": ["\u200b"]}, "A phrase to preserve is empty"),
    ({"lam": 10**400}, "lam is 1000.*; it has to be a smaller number"),
    ({"lam": [0.1]}, r"lam is \[0.1\]; it has to be a number"),
    ({"after": "x"}, "after is 'x'; expected an Edit .*load_edit reads a saved one"),
    ({"preserve_weight": np.float64("nan")}, "preserve_weight is"),
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
            (3, "pairs is a list"),
            (Replacement("dog", "cat"), "pairs is a list"),
            ([("dog", 3)], "A pair is two phrases"),
            ([("dog", "cat", "car")], "A pair is two phrases"),
            ([("\u200b", "cat")], "phrase to edit is empty"),
            ([("dog\ud800", "cat")], "no valid Unicode text"),
            ([Replacement("dog", "cat", weights=0.5)], "weights of 'dog' are 0.5"),
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


def test_an_unknown_argument_is_named(sd):
    with pytest.raises(UsageError, match="argument 'lambda_'"):
        Editor(sd).edit([("dog", "cat")], lambda_=0.1)


class TestSeveral:
    @pytest.mark.parametrize("lams", [1.0, "1", None, 3])
    def test_lambdas_that_are_no_list(self, sd, lams):
        with pytest.raises(UsageError, match=r"lams is a list of numbers, such as .*; not"):
            Editor(sd).path(PAIRS, lams)

    @pytest.mark.parametrize(
        ("lams", "words"),
        [([], "lams is empty"), (["1"], "lam is '1'"), ([0.1, True], "lam is True")],
    )
    def test_wrong_lambdas(self, sd, lams, words):
        with pytest.raises(UsageError, match=words):
            Editor(sd).path(PAIRS, lams)

    @pytest.mark.parametrize("lists", ["dog", 3, None])
    def test_lists_that_are_none(self, sd, lists):
        with pytest.raises(UsageError, match="edit_each takes a list of lists of pairs"):
            Editor(sd).edit_each(lists)

    def test_pairs_that_are_no_lists_of_pairs(self, sd):
        with pytest.raises(UsageError, match="A pair is two phrases"):
            Editor(sd).edit_each([("dog", "cat")])
        with pytest.raises(UsageError, match="pairs is a list"):
            Editor(sd).edit_each([3])  # type: ignore[list-item]


def test_numbers_of_numpy_are_numbers(sd):
    plain = Editor(sd).edit(
        [Replacement("dog", ("cat", "car"), 0.5, (1.0, 3.0))],
        lam=0.25, preserve=["red"], preserve_weight=2.0, tokens="last",
    )  # fmt: skip
    given = Editor(sd).edit(
        [Replacement("dog", ("cat", "car"), np.float32(0.5), np.array([1, 3]))],  # type: ignore[arg-type]
        lam=np.float32(0.25), preserve=np.array(["red"]), preserve_weight=np.int64(2),
        tokens="last",
    )  # fmt: skip
    assert json.dumps(given.manifest) == json.dumps(plain.manifest)
    for name, change in plain.changes.items():
        assert torch.equal(given.changes[name].dense, change.dense)
    lams = np.array([0.1, 1.0])
    assert [e.manifest["lam"] for e in Editor(sd).path(PAIRS, lams)] == [0.1, 1.0]


def test_an_edit_on_top_of_one_that_is_in_place_says_what_to_do():
    pipe = tiny_pipeline("sd")
    editor = Editor(pipe)
    first = editor.edit([("dog", "cat")])
    second = editor.edit([("car", "house")], after=first)
    first.apply_(pipe)
    with pytest.raises(ModelError) as caught:
        second.apply_(pipe)
    said = str(caught.value)
    assert "It holds what it was made on top of as well (dog -> cat)" in said
    assert "revert it first" in said
    first.revert_(pipe)
    second.apply_(pipe)
    second.revert_(pipe)
