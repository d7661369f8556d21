"""Layer 0's inputs with each token projected once, against running the encoder with a hook."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fasttrace import Editor
from fasttrace.adapters.pipeline import Model
from fasttrace.edit import inputs
from fasttrace.edit.layer_zero import is_layer_zero, read_layer_zero

PROMPTS = [
    "big dog",
    "a photo of a big dog",
    "",
    "a tiny cat in the house and a red car",
    "big dog",
]


def out_proj(encoder: Any, layer: int = 0) -> dict[str, Any]:
    return {"it": encoder.layers[layer].self_attn.out_proj}


@pytest.mark.parametrize("length", [1, 5, 24])
@pytest.mark.parametrize("number", [0, 1])
def test_equals_the_run_encoder(own, number, length):
    encoder = Model(own("sdxl")).encoders[number]
    given = inputs._given(encoder, PROMPTS, length)
    with torch.no_grad():
        ran = inputs._run(encoder, out_proj(encoder), given)["it"]
        found = read_layer_zero(encoder, given["input_ids"])
    assert found.shape == ran.shape == (len(PROMPTS), length, encoder.width)
    assert float((found - ran).abs().max()) <= 1e-6 * float(ran.abs().max())
    assert length == 1 or float((ran[0] - ran[1]).abs().max()) > 1e-2
    assert torch.equal(found[0], found[4])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equals_it_in_half_precision(own, dtype):
    encoder = Model(own("sd", dtype)).encoders[0]
    given = inputs._given(encoder, PROMPTS, 9)
    with torch.no_grad():
        ran = inputs._run(encoder, out_proj(encoder), given)["it"]
        found = read_layer_zero(encoder, given["input_ids"])
    assert found.dtype == ran.dtype == dtype
    assert float((found - ran).abs().max()) <= 4 * torch.finfo(dtype).eps * float(ran.abs().max())


def test_is_only_for_what_it_computes(own):
    encoder = Model(own("sd")).encoders[0]
    layer = encoder.layers[0]
    assert is_layer_zero(encoder, out_proj(encoder))
    assert not is_layer_zero(encoder, out_proj(encoder, 1))
    assert not is_layer_zero(encoder, {"it": layer.mlp.fc2})
    assert not is_layer_zero(encoder, out_proj(encoder) | {"other": layer.mlp.fc2})
    for part in (encoder.module, layer.layer_norm1, encoder.core.embeddings.token_embedding):
        handle = part.register_forward_hook(lambda *_: None)
        assert not is_layer_zero(encoder, out_proj(encoder))
        handle.remove()
    encoder.module.config.use_attention_mask = True
    try:
        assert not is_layer_zero(encoder, out_proj(encoder))
    finally:
        del encoder.module.config.use_attention_mask
    assert is_layer_zero(encoder, out_proj(encoder))


def test_an_edit_is_the_same_either_way(own, monkeypatch):
    editor = Editor(own("sd"))
    pairs = [("big dog", "cat"), ("red car", "house")]
    [fast] = editor.edit(pairs).changes.values()
    asked = []

    def refuse(*_args: Any) -> bool:
        asked.append(True)
        return False

    monkeypatch.setattr(inputs, "is_layer_zero", refuse)
    [slow] = editor.edit(pairs).changes.values()
    assert asked
    assert float((fast.dense - slow.dense).norm() / slow.dense.norm()) <= 1e-4
