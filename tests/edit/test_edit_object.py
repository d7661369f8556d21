"""Edits go in and come out byte for byte, or say why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fasttrace import Editor
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.edit import edit as edit_module
from fasttrace.edit.edit import Edit
from fasttrace.engine.base import CLEAN, CORRUPT, FLOOR, Pair
from fasttrace.engine.fast import FastEngine
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.errors import ModelError, UsageError
from fasttrace.testing import runs_of_pairs, tiny_pipeline
from fasttrace.types import Lane, Patch, Sampling

PAIRS = [("big dog", "cat")]
OTHER = [("red", "blue house")]
ONE = "text_encoder.layers.0.self_attn.out_proj"


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline("sd")


def both(pipe: Any, pairs: Any = PAIRS) -> Edit:
    """Of a text encoder and, on top, of the UNet."""
    editor = Editor(pipe)
    return editor.edit(pairs, method="uce", after=editor.edit(pairs))


class TestBytes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_in_and_out(self, own, family, slow, dtype):
        pipe = own(family, dtype)
        before = slow.state(pipe)
        edit = both(pipe)
        assert len(edit.changes) > 8
        # added in float32, cast last
        expected = {
            name: (slow.module(pipe, name).weight.float() + change.dense.float()).to(dtype)
            for name, change in edit.changes.items()
        }
        edit.apply_(pipe)
        during = slow.state(pipe)
        moved = [name for name in before if during[name] != before[name]]
        assert len(moved) == len(edit.changes)
        for name, weight in expected.items():
            assert torch.equal(slow.module(pipe, name).weight, weight)
        edit.revert_(pipe)
        assert slow.state(pipe) == before
        with edit.applied(pipe) as same:
            assert same is pipe
            assert slow.state(pipe) == during
        assert slow.state(pipe) == before

    def test_after_an_exception(self, own, slow):
        pipe = own("sd")
        before, edit = slow.state(pipe), both(own("sd"))

        def fail() -> None:
            assert slow.state(pipe) != before
            raise KeyError("inside")

        with pytest.raises(KeyError, match="inside"), edit.applied(pipe):
            fail()
        assert slow.state(pipe) == before
        with edit.applied(pipe):
            pass

    def test_parameters_stay_the_same_objects(self, pipe):
        def seen() -> list[Any]:
            parts = (pipe.unet, pipe.text_encoder)
            return [(id(p), p.requires_grad, p.data_ptr()) for m in parts for p in m.parameters()]

        before, edit = seen(), both(pipe)
        pipe.unet.train()
        with edit.applied(pipe):
            assert seen() == before
            assert pipe.unet.training
        assert seen() == before

    def test_a_failure_half_way_leaves_nothing(self, pipe, slow, monkeypatch):
        before, edit = slow.state(pipe), both(pipe)
        done: list[int] = []

        def failing(weight: Any, change: Any) -> Any:
            done.append(1)
            if len(done) == 4:
                raise MemoryError
            return weight + change.dense.float()

        monkeypatch.setattr(edit_module, "edited", failing)
        with pytest.raises(MemoryError):
            edit.apply_(pipe)
        assert len(done) == 4
        assert slow.state(pipe) == before
        monkeypatch.undo()
        with edit.applied(pipe):
            pass
        assert slow.state(pipe) == before

    def test_a_model_made_narrower_meanwhile(self, pipe, slow):
        edit = both(pipe)
        narrow = tiny_pipeline("sd").to(dtype=torch.bfloat16)
        edit.apply_(pipe)
        pipe.to(dtype=torch.bfloat16)
        edit.revert_(pipe)
        assert slow.state(pipe) == slow.state(narrow)


class TestOrder:
    def test_nested_on_the_same_matrix(self, pipe, slow):
        first, second = Editor(pipe).edit(PAIRS), Editor(pipe).edit(OTHER)
        before = slow.state(pipe)
        with first.applied(pipe):
            one = slow.state(pipe)
            with pytest.raises(ModelError, match="made on other weights"):
                second.apply_(pipe)
            with second.applied(pipe, force=True):
                two = slow.state(pipe)
                with pytest.raises(ModelError, match="revert what came later first"):
                    first.revert_(pipe)
                assert slow.state(pipe) == two
            assert slow.state(pipe) == one
            with second.applied(pipe, force=True):  # again
                assert slow.state(pipe) == two
        assert slow.state(pipe) == before
        assert len({x[f"{ONE.replace('.layers', '.encoder.layers')}.weight"]
                    for x in (before, one, two)}) == 3  # fmt: skip

    def test_edits_of_different_matrices_in_any_order(self, pipe, slow):
        before = slow.state(pipe)
        text, unet = Editor(pipe).edit(PAIRS), Editor(pipe).edit(PAIRS, method="uce")
        text.apply_(pipe)
        unet.apply_(pipe)
        text.revert_(pipe)
        unet.revert_(pipe)
        assert slow.state(pipe) == before

    def test_an_edit_made_while_another_is_in(self, pipe, slow):
        before = slow.state(pipe)
        with Editor(pipe).edit(PAIRS).applied(pipe):
            second = Editor(pipe).edit(OTHER)
            with second.applied(pipe):
                pass
        assert slow.state(pipe) == before
        with pytest.raises(ModelError, match="made on other weights"):
            second.apply_(pipe)

    def test_twice(self, pipe, slow):
        edit = Editor(pipe).edit(PAIRS)
        with pytest.raises(UsageError, match="is not applied to this pipeline"):
            edit.revert_(pipe)
        before = slow.state(pipe)
        edit.apply_(pipe)
        during = slow.state(pipe)
        for force in (False, True):
            with pytest.raises(UsageError, match="already applied to this pipeline; revert it"):
                edit.apply_(pipe, force=force)
        with pytest.raises(UsageError, match="already applied"), edit.applied(pipe):
            pass
        assert slow.state(pipe) == during
        edit.revert_(pipe)
        assert slow.state(pipe) == before
        with pytest.raises(UsageError, match="is not applied"):
            edit.revert_(pipe)

    def test_two_pipelines(self, pipe, slow):
        twin = tiny_pipeline("sd")
        before, edit = slow.state(pipe), Editor(pipe).edit(PAIRS)
        with edit.applied(pipe), edit.applied(twin):
            assert slow.state(twin) == slow.state(pipe) != before
        assert slow.state(twin) == slow.state(pipe) == before

    @pytest.mark.parametrize("through_data", [False, True])
    def test_weights_written_since(self, pipe, slow, through_data):
        edit = both(pipe)
        edit.apply_(pipe)
        layer = slow.module(pipe, list(edit.changes)[-1])
        with torch.no_grad():
            (layer.weight.data if through_data else layer.weight).mul_(2)
        during = slow.state(pipe)
        with pytest.raises(ModelError, match="was changed since the edit was applied"):
            edit.revert_(pipe)
        assert slow.state(pipe) == during

    def test_weights_written_and_put_back(self, pipe, slow):
        before, edit = slow.state(pipe), both(pipe)
        edit.apply_(pipe)
        with scope(pipe, keep_weights=True), torch.no_grad():
            slow.module(pipe, ONE).weight.mul_(2)
        edit.revert_(pipe)
        assert slow.state(pipe) == before


class TestWhose:
    def test_another_model_of_the_same_shape(self, pipe, slow):
        other = tiny_pipeline("sd", seed=1)
        before = slow.state(other)
        for edit in (Editor(pipe).edit(PAIRS), Editor(pipe).edit(PAIRS, method="uce")):
            with pytest.raises(ModelError, match="on other weights than these .*force it"):
                edit.apply_(other)
            assert slow.state(other) == before
            with edit.applied(other, force=True):
                for name, change in edit.changes.items():
                    weight = slow.module(other, name).weight.detach()
                    assert not torch.equal(weight, slow.module(pipe, name).weight)
                    assert bool(change.dense.float().abs().max() > 0)
            assert slow.state(other) == before

    def test_another_dtype(self, pipe):
        edit = Editor(pipe).edit(PAIRS)
        half = tiny_pipeline("sd").to(dtype=torch.float16)
        with pytest.raises(ModelError, match="on other weights"):
            edit.apply_(half)
        with edit.applied(half, force=True):
            pass

    def test_one_weight_is_enough(self, pipe, slow):
        edit = both(pipe)
        with torch.no_grad():
            slow.module(pipe, list(edit.changes)[-1]).weight[0, 0] += 1
        with pytest.raises(ModelError, match=f"first: {list(edit.changes)[-1]}"):
            edit.apply_(pipe)

    @pytest.mark.parametrize("force", [False, True])
    def test_another_architecture(self, pipe, slow, force):
        other = tiny_pipeline("sdxl")
        before = slow.state(other)
        site = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
        edit = Editor(pipe).edit(PAIRS, site=site)
        with pytest.raises(ModelError, match=r"to_k is \(16, 32\) here, but \(16, 16\) in the"):
            edit.apply_(other, force=force)
        edit = Editor(other).edit(PAIRS)
        with pytest.raises(ModelError, match="has no text_encoder_2.layers.0.self_attn.out_proj"):
            edit.apply_(pipe, force=force)
        assert slow.state(other) == before
        assert slow.state(pipe) == slow.state(tiny_pipeline("sd"))

    def test_one_encoder_of_another_pipeline(self, pipe):
        """SDXL's first encoder is SD's, byte for byte; its edit would be half of one."""
        other = tiny_pipeline("sdxl")
        edit = Editor(pipe).edit(PAIRS)
        with pytest.raises(ModelError, match="other weights .* with text encoders: 1"):
            edit.apply_(other)
        with edit.applied(other, force=True):
            pass

    def test_weights_that_cant_be_written(self, pipe):
        edit = Editor(pipe).edit(PAIRS, method="uce")
        pipe.fuse_qkv_projections()
        with pytest.raises(ModelError, match="reads its fused projections"):
            edit.apply_(pipe)
        with pytest.raises(ModelError, match="is not a text-to-image pipeline"):
            edit.apply_(None)

    def test_the_fingerprint_is_the_base_models(self, pipe):
        one, other = Editor(pipe).edit(PAIRS), Editor(pipe).edit(OTHER)
        assert one.fingerprint == other.fingerprint
        strange = Editor(tiny_pipeline("sd", seed=1)).edit(PAIRS)
        assert strange.fingerprint != one.fingerprint
        assert Editor(pipe).edit(PAIRS, method="mlp").fingerprint != one.fingerprint


def test_the_fast_engine_is_never_stale(own):
    """Keys and values are tables made beforehand: engines made before and during see both."""
    pipe = own("sd")
    model = Model(pipe)
    sites = [s for s in model.sites(16, 16).sites if s.kind in ("attn2", "resnet")][::4]
    lanes = tuple(Lane((Patch(s),)) for s in sites)
    edit = Editor(pipe).edit(PAIRS, method="uce")

    def run(engine: Any) -> dict[Any, Any]:
        with scope(pipe):
            sampling = Sampling(2, 3.0, 16, 16)
            texts = {
                run: model.text(words, "", True)
                for run, words in ((CLEAN, "a big dog"), (CORRUPT, "a red car"))
            }
            pair = Pair(texts, CORRUPT, model.start(sampling, 3), sampling, lanes)
            found = runs_of_pairs(engine, [pair])
        return {key: latents for key, latents in found.items() if key[1] != FLOOR}

    def assert_same(found: Any, expected: Any) -> None:
        for key, latents in expected.items():
            rms = float(latents.square().mean().sqrt())
            assert float((found[key] - latents).abs().max()) <= 1e-4 * rms, key

    early = FastEngine(model)
    plain, slow_plain = run(early), run(ReferenceEngine(model))
    assert_same(plain, slow_plain)
    with edit.applied(pipe):
        late, slow_edited = FastEngine(model), run(ReferenceEngine(model))
        for engine in (early, late):
            assert_same(run(engine), slow_edited)
    for key, latents in slow_plain.items():
        assert float((slow_edited[key] - latents).abs().max()) > 1e-3
    for engine in (early, late):
        found = run(engine)
        assert all(torch.equal(found[key], plain[key]) for key in plain)


def test_reading_an_edit_leaves_no_trace(own, slow):
    """What only looks: parameters, fingerprint, words, dense changes."""
    pipe = own("sd")
    before = slow.state(pipe)
    edit = both(pipe)
    looks: list[Callable[[], Any]] = [
        lambda: edit.parameters, lambda: edit.fingerprint, lambda: str(edit), lambda: repr(edit),
        lambda: [c.dense for c in edit.changes.values()],
    ]  # fmt: skip
    for look in looks:
        look()
    assert slow.state(pipe) == before
