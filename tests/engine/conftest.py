"""UNets and their inputs for the tests of the compiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from fasttrace.adapters.architectures import ARCHITECTURES
from fasttrace.engine.graph.capture import capture

# The published layouts, far narrower: blocks, depths and options stay as they are.
REDUCED: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (8, 16, 24, 24), "attention_head_dim": 2},
    "sd21": {"block_out_channels": (8, 16, 24, 24), "attention_head_dim": (1, 2, 3, 3)},
    "sdxl": {
        "block_out_channels": (8, 16, 24),
        "attention_head_dim": (1, 2, 3),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 10,
    },
}
TEXT, TOKENS = 12, 7


@pytest.fixture(scope="session")
def unets(loaded: Callable[[str], Any]) -> Callable[[str], Any]:
    """UNets by name: "sd" and "sdxl tiny" are the tiny pipelines', the others `REDUCED`."""

    @cache
    def build(name: str) -> Any:
        if name in ("tiny sd", "tiny sdxl"):
            return loaded(name.removeprefix("tiny ")).unet
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = ARCHITECTURES[name]["unet"] | REDUCED[name]
            config |= {"norm_num_groups": 4, "cross_attention_dim": TEXT, "sample_size": 8}
            return UNet2DConditionModel(**config).eval().requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., dict[str, Any]]:
    return inputs_of


def inputs_of(
    unet: nn.Module,
    rows: int = 4,
    size: int | None = None,
    seed: int = 0,
    tokens: int = TOKENS,
    device: str = "cpu",
) -> dict[str, Any]:
    """Keyword arguments of a call in which every row differs; timesteps are equal."""
    config: Any = unet.config
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        if device == "meta":
            return torch.empty(shape, device=device)
        return torch.randn(shape, generator=generator)

    side = size or config.sample_size
    inputs: dict[str, Any] = {
        "sample": random(rows, 4, side, side),
        "timestep": torch.full((rows,), 501, device=device),
        "encoder_hidden_states": random(rows, tokens, config.cross_attention_dim),
        "return_dict": False,
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": random(rows, pooled),
            "time_ids": torch.full((rows, 6), 16.0, device=device),
        }
    return inputs


@pytest.fixture(scope="session")
def captured(unets: Callable[[str], Any]) -> Callable[..., Any]:
    """Graphs by UNet and number of rows: tracing takes a second or two."""

    @cache
    def build(name: str, rows: int = 4) -> Any:
        return capture(unets(name), inputs_of(unets(name), rows))

    return build
