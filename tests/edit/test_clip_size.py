"""CLIP's own vocabulary and an encoder of its width: what the released settings come to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fasttrace import Editor
from fasttrace.edit.phrases import TEMPLATES, collect, parse_replacements
from fasttrace.testing.clip import clip_size_pipeline, clip_tokenizer

VAN_GOGH = [("van gogh", "painting")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return clip_tokenizer()


# Known ids of openai/clip-vit-large-patch14.
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("A Photo  of a CAT", [320, 1125, 539, 320, 2368]),
        ("", []),
        ("hello world!", [3306, 1002, 256]),
        ("van gogh", [2451, 19697]),
    ],
)
def test_tokens_are_clips(tokenizer, text, ids):
    assert tokenizer(text).input_ids == [49406, *ids, 49407]


def test_vocabulary(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert len(vocabulary) == 49408
    assert sorted(vocabulary.values()) == list(range(49408))
    assert [vocabulary[token] for token in ("!", "!</w>", "in", "jekyll</w>")] == [
        0,
        256,
        512,
        49405,
    ]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 49407
    assert tokenizer.model_max_length == 77


def test_released_settings_on_an_encoder_as_wide_as_clips():
    random = torch.get_rng_state()
    pipe = clip_size_pipeline(layers=1)
    assert torch.equal(torch.get_rng_state(), random)
    editor = Editor(pipe)
    [encoder] = editor.model.encoders
    pairs = parse_replacements(VAN_GOGH, empty_new=False)
    assert collect(encoder, pairs, TEMPLATES, "last").pairs == 4
    assert collect(encoder, pairs, TEMPLATES, "last_to_end").pairs == 291
    edit = editor.edit(VAN_GOGH)
    assert edit.parameters == 768 * 768 == 589_824
    [change] = edit.changes.values()
    assert change.left.shape == (768, 291)
    before = pipe.text_encoder.encoder.layers[0].self_attn.out_proj.weight.detach().clone()
    with edit.applied(pipe):
        after = pipe.text_encoder.encoder.layers[0].self_attn.out_proj.weight.detach()
        assert float((after - before).norm() / before.norm()) > 1e-2
