"""The fine-tuned ways that the erase table compares with, on a tiny pipeline."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrace.testing import tiny_pipeline

SCRIPT = Path(__file__).parents[2] / "bench" / "finetuned.py"


@pytest.fixture(scope="module")
def finetuned() -> Any:
    """bench/ is no package."""
    spec = importlib.util.spec_from_file_location("bench_finetuned", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


@pytest.fixture(scope="module")
def ddim() -> Any:
    return tiny_pipeline(scheduler="DDIM")


def tune(finetuned: Any, way: str, pipe: Any, **options: Any) -> dict[str, torch.Tensor]:
    options = {"steps": 2, "calls": 3, "rate": 1e-2} | options
    if way == "esd":
        return finetuned.esd(pipe, ["a dog", "a photo of a dog"], **options)
    return finetuned.concept_ablation(pipe, "a dog", "a cat", pictures=2, **options)


@pytest.mark.parametrize(
    ("way", "parts"), [("esd", ("to_q", "to_k", "to_v", "to_out")), ("ablation", ("to_k", "to_v"))]
)
def test_tunes_cross_attention_alone(
    finetuned: Any, ddim: Any, slow: Any, way: str, parts: tuple[str, ...]
) -> None:
    before, state = slow.state(ddim), torch.get_rng_state()
    weights = tune(finetuned, way, ddim)
    assert slow.state(ddim) == before
    assert torch.equal(torch.get_rng_state(), state)
    own = dict(ddim.unet.named_parameters())
    assert set(weights) == {
        n for n in own if ".attn2." in n and n.split(".attn2.")[1].split(".")[0] in parts
    }
    assert all(not w.requires_grad for w in weights.values())
    # A key's bias would not matter, but these layers have none.
    assert all(not torch.equal(w, own[n]) for n, w in weights.items())
    again = tune(finetuned, way, ddim)
    assert all(torch.equal(w, again[n]) for n, w in weights.items())


def test_weights_go_in_and_come_out(finetuned: Any, ddim: Any, slow: Any) -> None:
    before = slow.state(ddim)
    weights = tune(finetuned, "ablation", ddim)
    own = dict(ddim.unet.named_parameters())

    def fail() -> None:
        with finetuned.applied(ddim, weights):
            assert all(torch.equal(own[n], w) for n, w in weights.items())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert slow.state(ddim) == before


@pytest.mark.parametrize("way", ["esd", "ablation"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_goes_down(finetuned: Any, way: str, prediction: str) -> None:
    pipe = tiny_pipeline(scheduler="DDIM")
    pipe.scheduler.register_to_config(prediction_type=prediction)
    random = torch.Generator().manual_seed(5)
    x = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=random)
    texts = [finetuned._encode(pipe, p) for p in ("a dog", "" if way == "esd" else "a cat")]
    loss = finetuned.esd_loss if way == "esd" else finetuned.ablation_loss
    frozen = tiny_pipeline(scheduler="DDIM").unet
    time = torch.tensor([500])

    def now() -> float:
        with torch.no_grad():
            return float(loss(pipe.unet, frozen, x, time, *texts))

    before = now()
    with finetuned.applied(pipe, tune(finetuned, way, pipe, steps=10)):
        assert now() < before
