"""The width of the text embedding, which configurations say in several ways."""

from __future__ import annotations

import pytest
import torch

from fasttrace import Editor
from fasttrace.adapters.pipeline import Model
from fasttrace.edit.inputs import _width
from fasttrace.errors import ModelError
from fasttrace.testing import tiny_pipeline


class TestTheWidthOfTheTextEmbedding:
    """Some configurations say it block by block, or layer by layer."""

    def test_a_list_of_one_width_is_that_width(self):
        pipe = tiny_pipeline("sd")
        model = Model(pipe)
        width = pipe.unet.config.cross_attention_dim
        plain = Editor(pipe).edit([("dog", "cat")], method="uce")
        blocks = len(pipe.unet.config.down_block_types)
        pipe.unet.register_to_config(cross_attention_dim=[[width, width]] * blocks)
        assert _width(model) == width
        pipe.unet.register_to_config(cross_attention_dim=[width] * blocks)
        assert _width(model) == width
        found = Editor(pipe).edit([("dog", "cat")], method="uce")
        for name, change in plain.changes.items():
            assert torch.equal(found.changes[name].dense, change.dense)

    def test_several_widths_are_refused(self):
        pipe = tiny_pipeline("sd")
        width = pipe.unet.config.cross_attention_dim
        pipe.unet.register_to_config(cross_attention_dim=[width, (width, 2 * width)])
        with pytest.raises(ModelError, match="inputs of several widths"):
            _width(Model(pipe))
