"""Edits of SD 2.1, SDXL-Turbo, Kandinsky 2.1 and 2.2: solved, applied, exported, loaded again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fasttrace_exports import LORAS, PAIRS, assert_same_pictures
from torch import Tensor, nn

import fasttrace
from fasttrace import Editor, load_edit
from fasttrace.adapters.pipeline import Model
from fasttrace.adapters.scope import scope
from fasttrace.adapters.text import TextEncoder
from fasttrace.edit.generate import Order, felt, generate
from fasttrace.engine.fast import FastEngine
from fasttrace.engine.reference import ReferenceEngine
from fasttrace.errors import UsageError
from fasttrace.testing import tiny_pipeline
from fasttrace.types import Sampling

# 2.2's combined pipeline warns of its own call.
pytestmark = pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated")

LAM, TEMPLATE = 0.01, "a photo of a {}"
STABLE, KANDINSKY = ("sd21", "sdxl-turbo"), ("kandinsky21", "kandinsky22")


def picture_of(pipe: Any, prompt: str = "a photo of a big dog") -> Tensor:
    """[1, 3, 16, 16]"""
    found: Tensor = pipe(
        prompt,
        num_inference_steps=2,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    return found


def linear_of(encoder: TextEncoder) -> nn.Linear:
    """Layer 0's projection behind the attention, by the tree alone."""
    module = encoder.module
    if hasattr(module, "transformer"):
        return module.transformer.encoder.layer[0].attention.output.dense
    core = module.text_model if hasattr(module, "text_model") else module
    return core.encoder.layers[0].self_attn.out_proj


def read(encoder: TextEncoder, prompt: str) -> tuple[Tensor, Tensor]:
    """Inputs and outputs [window, d] of that projection, the prompt whole and padded."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = linear_of(encoder).register_forward_hook(
        lambda _m, args, out: seen.append((args[0][0], out[0]))
    )
    given = encoder.tokenizer(
        prompt, padding="max_length", max_length=encoder.window, return_tensors="pt"
    )
    masked = {} if encoder.causal else {"attention_mask": given.attention_mask}
    with torch.no_grad():
        encoder.module(input_ids=given.input_ids, **masked)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", [*STABLE, *KANDINSKY])
def test_the_change_is_the_formula(own, family):
    """(lam W0 + V K^T)(lam I + K K^T)^-1 of every encoder's layer 0, whole prompts, in float64."""
    pipe = own(family)
    edit = Editor(pipe).edit([("dog", "cat")], templates=[TEMPLATE], lam=LAM)
    encoders = Model(pipe).encoders
    assert list(edit.changes) == [f"{e.name}.layers.0.self_attn.out_proj" for e in encoders]
    for encoder in encoders:
        old, new = (TEMPLATE.format(word) for word in ("dog", "cat"))
        places = [encoder.span(p, w).stop - 1 for p, w in ((old, "dog"), (new, "cat"))]
        length = encoder.window - max(places)
        keys = read(encoder, old)[0][places[0] : places[0] + length].double()
        layer = linear_of(encoder)
        goals = read(encoder, new)[1][places[1] : places[1] + length].double()
        goals = goals - layer.bias.detach().double()
        before = layer.weight.detach().double()
        eye = torch.eye(before.shape[1], dtype=torch.float64)
        solved = (LAM * before + goals.T @ keys) @ torch.linalg.inv(LAM * eye + keys.T @ keys)
        change = edit.changes[f"{encoder.name}.layers.0.self_attn.out_proj"].dense
        torch.testing.assert_close(before + change, solved, rtol=0, atol=1e-4)
        assert float(change.norm()) > 0.05 * float(before.norm())


@pytest.mark.parametrize("family", [*STABLE, *KANDINSKY])
def test_applied_reverted_saved_and_loaded(own, family, tmp_path, slow):
    pipe = own(family)
    edit = Editor(pipe).edit(PAIRS)
    before, plain = slow.state(pipe), picture_of(pipe)
    with edit.applied(pipe):
        expected = picture_of(pipe)
        weights = [linear_of(encoder).weight.clone() for encoder in Model(pipe).encoders]
    assert slow.state(pipe) == before
    assert torch.equal(picture_of(pipe), plain)
    assert float((expected - plain).abs().max()) > 1e-3
    edit.save(tmp_path / "edit", forms=["pipeline"], pipe=pipe)
    loaded = fasttrace.load(str(tmp_path / "edit" / "pipeline"))
    assert type(loaded) is type(pipe)
    for encoder, weight in zip(Model(loaded).encoders, weights, strict=True):
        assert torch.equal(linear_of(encoder).weight, weight), encoder.name
    # The same weights elsewhere in memory: sums are rounded otherwise.
    torch.testing.assert_close(picture_of(loaded), expected, rtol=0, atol=1e-4)
    with load_edit(tmp_path / "edit").applied(pipe):
        torch.testing.assert_close(picture_of(pipe), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("form", LORAS)
@pytest.mark.parametrize("family", STABLE)
def test_a_lora(family, form, tmp_path):
    pytest.importorskip("peft")
    pipe = tiny_pipeline(family)
    editor = Editor(pipe)
    edit = editor.edit(PAIRS, method="uce", after=editor.edit(PAIRS))
    plain = picture_of(pipe)
    with edit.applied(pipe):
        expected = picture_of(pipe)
    edit.save(tmp_path / "edit", forms=["peft", "kohya"])
    pipe.load_lora_weights(tmp_path / "edit", weight_name=LORAS[form])
    assert_same_pictures(picture_of(pipe), expected, plain)


@pytest.mark.parametrize("family", KANDINSKY)
class TestKandinsky:
    @pytest.mark.parametrize("options", [{}, {"forms": ["peft"]}, {"forms": ["kohya", "pipeline"]}])
    def test_no_lora_is_written(self, own, family, options, tmp_path):
        edit = Editor(own(family)).edit(PAIRS)
        pipe = own(family) if options else None
        with pytest.raises(UsageError, match="diffusers loads no LoRA into this kind of pipeline"):
            edit.save(tmp_path / "edit", pipe=pipe, **options)
        assert not (tmp_path / "edit").exists()

    def test_without_a_form_it_is_a_pipeline(self, own, family, tmp_path):
        edit = Editor(own(family)).edit(PAIRS, tokens="last", templates=["{}"])
        edit.save(tmp_path / "edit", pipe=own(family))
        assert (tmp_path / "edit" / "pipeline" / "model_index.json").is_file()

    def test_cross_attention_has_nothing_to_edit(self, own, family):
        with pytest.raises(UsageError, match="No site matches 'attn2'"):
            Editor(own(family)).edit(PAIRS, method="uce")
        site = "unet.mid_block.attentions.0"
        with pytest.raises(UsageError, match=f"{site} is of kind 'added_kv'"):
            Editor(own(family)).edit(PAIRS, site=site)

    def test_felt_and_generated(self, own, family):
        """Pictures under an edit that touches no weight are those of the edited pipeline."""
        pipe = own(family)
        model, sampling = Model(pipe), Sampling(2, 3.0, 16, 16)
        edit = Editor(pipe).edit(PAIRS)
        order = Order(("a photo of a big dog", "a red car", "a big dog"), 3, edit)
        with edit.applied(pipe), scope(pipe):
            text = model.text(order.prompts[2], "", True, model.start(sampling, 3))
        with felt(model, edit), scope(pipe):
            same = model.text(order.prompts[2], "", True, model.start(sampling, 3))
        torch.testing.assert_close(same.cond, text.cond, rtol=0, atol=1e-4)
        found = {}
        for engine in (ReferenceEngine(model), FastEngine(model)):
            rows = {}
            for _, numbers, latents in generate(model, engine, [order], sampling):
                rows |= dict(zip(numbers, latents, strict=True))
            found[engine.name] = torch.stack([rows[i] for i in range(3)])
        torch.testing.assert_close(found["fast"], found["reference"], rtol=1e-4, atol=1e-4)
        with edit.applied(pipe):
            plain = pipe(
                order.prompts[0],
                num_inference_steps=2,
                guidance_scale=3.0,
                height=16,
                width=16,
                generator=torch.Generator().manual_seed(3),
                output_type="pt",
            ).images
        picture = model.decode(found["reference"][:1])
        torch.testing.assert_close(picture, (plain / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-3)


def test_each_encoder_by_name(own):
    """2.1: the prior's alone, or the decoder's alone, or a later layer's MLP of it."""
    pipe = own("kandinsky21")
    for name in ("prior_text_encoder", "text_encoder"):
        edit = Editor(pipe).edit(PAIRS, site=f"{name}.layers.0.self_attn")
        assert list(edit.changes) == [f"{name}.layers.0.self_attn.out_proj"]
    edit = Editor(pipe).edit(PAIRS, site="text_encoder.layers.1.mlp")
    (change,) = edit.changes.values()
    assert change.dense.shape == (16, 32)
