"""Half precision: scaled gradients, NaN named by place and call, never silently zero."""

from __future__ import annotations

import pytest
import torch

from fasttrace import Tracer
from fasttrace.attribution.scaling import gradients
from fasttrace.errors import ModelError
from fasttrace.testing import tiny_pipeline

ASKED = {"steps": 2, "metric": "latent_recovery", "by": ("site", "head")}
PROMPT = ("a photo of a red dog", "dog")


def pull(function, at, cotangent, dtype, lanes=None):
    leaf = torch.full((len(cotangent), 1), at, dtype=dtype, requires_grad=True)
    return gradients(
        function(leaf), cotangent, {"x": leaf}, "call 3", lanes=lanes or len(cotangent)
    )["x"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e9])
def test_any_size_of_cotangent(dtype, size):
    """fp16 ends at 6e-8 and 65504; each lane has a scale of its own."""
    cotangent = torch.tensor([[size], [size * 1e-9], [0.0]])
    found = pull(lambda x: 3 * x, 1.0, cotangent, dtype)
    torch.testing.assert_close(found, 3 * cotangent, rtol=1e-2, atol=0)


def test_other_scales_where_gradients_grow_or_shrink():
    cotangent = torch.tensor([[1.0]])
    grown = pull(lambda x: (x * 2**7) * 2**7, 1.0, cotangent, torch.float16)  # 2^6 2^14 > 65504
    assert float(grown) == 2.0**14
    shrunk = pull(lambda x: (x * 2**-14) * 2**-12, 1.0, cotangent, torch.float16)
    assert float(shrunk) == 2.0**-26  # below the smallest of fp16 at a scale of 1


def test_what_no_scale_saves_is_named():
    cotangent = torch.tensor([[1.0]])
    with pytest.raises(ModelError, match=r"vanishes at x in call 3, at every scale tried"):
        pull(lambda x: x * 2.0**-24 * 2.0**-24, 1.0, cotangent, torch.float16)
    with pytest.raises(ModelError, match=r"is not finite at x in call 3, at every scale tried"):
        pull(lambda x: x * 2.0**15 * 2.0**15, 1.0, cotangent, torch.float16)
    with pytest.raises(ModelError, match="of the latents is not finite in call 3"):
        pull(lambda x: x, 1.0, torch.tensor([[float("nan")]]), torch.float16)
    with pytest.raises(ModelError, match="is not finite at x in call 3"):
        pull(lambda x: x.sqrt(), 0.0, cotangent, torch.float32)


def test_a_zero_cotangent_is_no_vanishing():
    assert not pull(lambda x: x, 1.0, torch.zeros(2, 1), torch.float16).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_screens_agree_with_float32(dtype):
    wide = Tracer(tiny_pipeline("sd")).screen(*PROMPT, **ASKED)
    half = Tracer(tiny_pipeline("sd").to(dtype)).screen(*PROMPT, **ASKED)
    names = [r.key for r in wide.readings]
    expected, found = (
        torch.cat([torch.as_tensor(s.effects(n)[0]) for n in names]) for s in (wide, half)
    )
    assert float(found.abs().min()) > 0
    # Activations of about 1 are rounded at 2^-11 and 2^-8 in some ten layers one after another.
    coarse = torch.finfo(dtype).eps * 10
    assert float((found - expected).norm() / expected.norm()) < coarse
    assert half.flops == wide.flops


def test_a_nan_of_the_way_forward_is_named():
    pipe = tiny_pipeline("sd").to(torch.float16)
    site = "unet.mid_block.attentions.0.transformer_blocks.0.ff"
    module = pipe.unet.get_submodule(site.removeprefix("unet."))
    with torch.no_grad():
        module.net[2].bias.fill_(float("inf"))
    with pytest.raises(ModelError) as error:
        Tracer(pipe).screen(*PROMPT, **ASKED)
    assert site in str(error.value)
    assert "call 0" in str(error.value)


def test_a_nan_of_the_way_back_is_named(monkeypatch):
    """A slope that is infinite where the value is fine, in one site of one call: the one that runs
    before it is the first whose gradient it spoils."""
    from fasttrace.attribution import backward

    real, site = backward.gradients, "unet.up_blocks.1.resnets.0"
    before = "unet.up_blocks.0.resnets.1"

    def spoilt(prediction, cotangent, at, where, **options):
        if where == "call 1":
            at[site].register_hook(lambda gradient: gradient * float("inf"))
        return real(prediction, cotangent, at, where, **options)

    monkeypatch.setattr(backward, "gradients", spoilt)
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(ModelError, match="not finite at .* in call 1") as error:
            Tracer(tiny_pipeline("sd").to(dtype)).screen(*PROMPT, **ASKED)
        assert f" {before} " in str(error.value)
