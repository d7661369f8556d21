"""Pictures in one batch of lanes against the pipeline itself with the edit applied."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrace import Editor
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.edit import generate as generate_module
from fasttrace.edit.edit import Edit
from fasttrace.edit.generate import Order, encode, felt, generate
from fasttrace.engine.fast import FastEngine
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.errors import ModelError, UsageError
from fasttrace.testing import tiny_pipeline
from fasttrace.types import Sampling

SAMPLING = Sampling(2, 3.0, 16, 16)
PROMPTS = ("a big dog", "a photo of a red car", "cat", "the house in blue style", "a tiny dog")
PAIRS = [("big dog", "cat"), ("red", "blue")]
CLOSE = 1e-4  # of the latent's rms: invariant 2


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def stage(request: pytest.FixtureRequest) -> Any:
    """A pipeline of its own with its model, engines and edits: a trace takes a second."""

    class Stage:
        pipe: Any = tiny_pipeline(request.param)
        model = Model(pipe)
        engines = {"fast": FastEngine(model), "reference": ReferenceEngine(model)}  # noqa: RUF012

    editor = Editor(Stage.pipe)
    text = editor.edit(PAIRS)
    mlp = editor.edit([("dog", "house")], method="mlp")
    unet = editor.edit(PAIRS, method="uce")
    both = editor.edit([("dog", "house")], method="uce", after=text)
    Stage.edits = {"none": None, "text": text, "mlp": mlp, "unet": unet, "both": both}
    return Stage


@cache
def plainly_once(pipe: Any, edit: int, prompt: str, seed: int, sampling: Sampling) -> Tensor:
    """edit: what is applied, since the same picture is asked for often."""
    return plainly(pipe, prompt, seed, sampling)


def plainly(pipe: Any, prompt: str, seed: int, sampling: Sampling = SAMPLING) -> Tensor:
    latents: Tensor = pipe(
        prompt,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        height=sampling.height,
        width=sampling.width,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images
    return latents


def expected_of(pipe: Any, order: Order, sampling: Sampling = SAMPLING) -> list[Tensor]:
    with nullcontext() if order.edit is None else order.edit.applied(pipe):
        return [plainly_once(pipe, id(order.edit), p, order.seed, sampling) for p in order.prompts]


def collected(found: Any) -> dict[tuple[int, int], Tensor]:
    latents: dict[tuple[int, int], Tensor] = {}
    for order, numbers, rows in found:
        assert len(numbers) == len(rows)
        for number, row in zip(numbers, rows, strict=True):
            assert (order, number) not in latents
            latents[order, number] = row[None].clone()
    return latents


def assert_pictures(stage: Any, engine: str, orders: list[Order], sampling: Any = SAMPLING) -> None:
    found = collected(generate(stage.model, stage.engines[engine], orders, sampling))
    assert set(found) == {(i, n) for i, o in enumerate(orders) for n in range(len(o.prompts))}
    for i, order in enumerate(orders):
        for n, latents in enumerate(expected_of(stage.pipe, order, sampling)):
            assert rms(found[i, n] - latents) <= CLOSE * rms(latents), (i, n)


@pytest.mark.parametrize("edit", ["none", "text", "unet"])
def test_as_many_prompts_as_you_like(stage, edit, slow):
    before = slow.state(stage.pipe)
    for count in (1, 2, 3, 5):
        orders = [Order(PROMPTS[:count], 3, stage.edits[edit])]
        assert_pictures(stage, "fast", orders)
    assert slow.state(stage.pipe) == before


def test_the_edits_of_this_test_are_seen(stage):
    """Else the comparison above says nothing."""
    plain = expected_of(stage.pipe, Order(PROMPTS[:1], 3))[0]
    pictures = [expected_of(stage.pipe, Order(PROMPTS[:1], 3, e))[0]
                for e in stage.edits.values() if e is not None]  # fmt: skip
    for i, picture in enumerate(pictures):
        for other in [plain, *pictures[:i]]:
            assert rms(picture - other) > 30 * CLOSE * rms(plain)


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_many_orders_at_once(stage, engine, slow):
    """Edits of text share a batch; seeds, numbers of prompts and repeated prompts as they come."""
    before = slow.state(stage.pipe)
    edits = stage.edits
    orders = [
        Order(PROMPTS[:3], 0, edits["text"]),
        Order(PROMPTS[:2], 1, edits["unet"]),
        Order(PROMPTS[1:], 0),
        Order(PROMPTS[:1], 2, edits["mlp"]),
        Order(PROMPTS[:3], 5, edits["both"]),
        Order(("a dog", "a dog", "a dog", "cat"), 0, edits["text"]),
        Order(PROMPTS[:3], 0, edits["unet"]),
    ]
    assert_pictures(stage, engine, orders)
    assert slow.state(stage.pipe) == before


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_guidance(stage, guidance):
    sampling = Sampling(2, guidance, 16, 16)
    orders = [Order(PROMPTS[:3], 1, stage.edits[e]) for e in ("none", "text", "unet")]
    assert_pictures(stage, "fast", orders, sampling)


def test_edits_of_text_touch_no_weight(stage, slow):
    versions = [p._version for p in stage.pipe.text_encoder.parameters()]
    hooks = [len(m._forward_hooks) for m in stage.pipe.text_encoder.modules()]
    orders = [Order(PROMPTS[:3], 0, stage.edits["text"]), Order(PROMPTS[:3], 0)]
    collected(generate(stage.model, stage.engines["fast"], orders, SAMPLING))
    assert [p._version for p in stage.pipe.text_encoder.parameters()] == versions
    assert [len(m._forward_hooks) for m in stage.pipe.text_encoder.modules()] == hooks


def test_stopping_half_way_puts_everything_back(stage, slow):
    before = slow.state(stage.pipe)
    orders = [Order(PROMPTS[:3], 0, stage.edits[e]) for e in ("text", "unet", "both")]
    running = generate(stage.model, stage.engines["reference"], orders, SAMPLING)
    for order, _, _ in running:
        if order == 1:
            break
    assert slow.state(stage.pipe) != before
    running.close()
    assert slow.state(stage.pipe) == before
    stage.pipe.text_encoder.train()
    collected(generate(stage.model, stage.engines["reference"], orders[:1], SAMPLING))
    assert stage.pipe.text_encoder.training
    stage.pipe.text_encoder.eval()


def test_an_edit_of_another_model_is_refused(stage, slow):
    other = tiny_pipeline("sd" if stage.model.two_texts else "sdxl", seed=1)
    before = slow.state(stage.pipe)
    edit = Editor(other).edit(PAIRS, method="uce")
    with pytest.raises(ModelError, match=r"another architecture|has no"):
        collected(
            generate(stage.model, stage.engines["fast"], [Order(PROMPTS[:1], 0, edit)], SAMPLING)
        )
    assert slow.state(stage.pipe) == before


def test_an_edit_of_other_weights_is_refused(stage, slow):
    """Whether it is written into the weights or felt."""
    other = tiny_pipeline("sdxl" if stage.model.two_texts else "sd", seed=1)
    before = slow.state(stage.pipe)
    for method in ("diffquickfix", "uce"):
        orders = [Order(PROMPTS[:1], 0, Editor(other).edit(PAIRS, method=method))]
        with pytest.raises(ModelError, match="made on other weights"):
            collected(generate(stage.model, stage.engines["fast"], orders, SAMPLING))
    assert slow.state(stage.pipe) == before


def test_no_prompt(stage):
    with pytest.raises(UsageError, match="no prompt to make a picture of"):
        collected(generate(stage.model, stage.engines["fast"], [Order((), 0)], SAMPLING))
    assert collected(generate(stage.model, stage.engines["fast"], [], SAMPLING)) == {}


class TestFelt:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("options", [{}, {"tokens": "last"}, {"method": "mlp"}])
    def test_layers_answer_as_if_the_edit_were_in_them(self, own, family, slow, dtype, options):
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        pipe = own(family, dtype)
        edit = Editor(pipe).edit(PAIRS, **options)
        with edit.applied(pipe):
            expected = slow.encode(pipe, PROMPTS)
        before, versions = slow.encode(pipe, PROMPTS), versions_of(pipe)
        with felt(Model(pipe), edit):
            found = slow.encode(pipe, PROMPTS)
        eps = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
        assert float((found - expected).norm()) <= eps * float(expected.norm())
        assert float((before - expected).norm()) > 1e-3 * float(expected.norm())
        assert torch.equal(slow.encode(pipe, PROMPTS), before)
        assert versions_of(pipe) == versions

    def test_no_edit_is_none(self, own, slow):
        pipe = own("sd")
        before = slow.encode(pipe, PROMPTS)
        with felt(Model(pipe), None):
            assert torch.equal(slow.encode(pipe, PROMPTS), before)

    def test_hooks_are_gone_after_an_error(self, own):
        pipe = own("sd")
        with pytest.raises(KeyError), felt(Model(pipe), Editor(pipe).edit(PAIRS)):
            raise KeyError
        assert not any(m._forward_hooks for m in pipe.text_encoder.modules())


def versions_of(pipe: Any) -> list[int]:
    return [p._version for p in pipe.text_encoder.parameters()]


@pytest.mark.parametrize("edit", ["none", "text"])
def test_texts_in_parts_are_those_of_one_pass(stage, edit, monkeypatch):
    given: Edit | None = stage.edits[edit]
    with scope(stage.pipe):
        whole = encode(stage.model, PROMPTS, given, SAMPLING)
        monkeypatch.setattr(generate_module, "AT_ONCE", 2)
        parts = encode(stage.model, PROMPTS, given, SAMPLING)
    assert len(whole) == len(parts) == len(PROMPTS)
    for one, other in zip(whole, parts, strict=True):
        assert rms(one.cond - other.cond) <= 1e-6 * rms(one.cond)
        assert one.cond.shape[0] == 1
        assert (one.pooled is None) == (not stage.model.two_texts)
        if one.pooled is not None:
            assert rms(one.pooled - other.pooled) <= 1e-6 * rms(one.pooled)
        assert torch.equal(one.uncond, other.uncond)
