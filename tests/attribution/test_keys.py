"""One text token's swapped key, through the softmax."""

from __future__ import annotations

import pytest
import torch

from fasttrace import Tracer
from fasttrace.attribution.keys import swapped_keys
from fasttrace.testing import tiny_pipeline


def tensors(seed: int, rows=2, heads=3, places=5, tokens=7, width=4, out=6, size=1.0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return size * torch.randn(rows, heads, *shape, generator=generator, dtype=torch.float64)

    return (
        random(places, width),
        random(tokens, width),
        random(tokens, width),
        random(tokens, out),
        random(places, out),
    )


def exact(query, keys, new, values, gradient, scale):
    """[B, H, n]: the softmax itself with one key swapped, token by token."""

    def score(k: torch.Tensor) -> torch.Tensor:
        attended = (scale * query @ k.mT).softmax(-1) @ values
        return (attended * gradient).sum((-1, -2))

    found = []
    for token in range(keys.shape[2]):
        swapped = keys.clone()
        swapped[:, :, token] = new[:, :, token]
        found.append(score(swapped) - score(keys))
    return torch.stack(found, -1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_equals_the_exact_softmax(seed, size, scale):
    given = tensors(seed, size=size)
    expected = exact(*given, 0.5 if scale is None else scale)  # 1 / sqrt(4)
    assert float(expected.abs().max()) > 1e-4
    torch.testing.assert_close(swapped_keys(*given, scale), expected, rtol=1e-9, atol=1e-12)


def test_logits_that_would_overflow():
    """A ratio of e^900 is no number; what it does to the probabilities is one."""
    query, keys, new, values, gradient = tensors(0, rows=1, heads=1, places=2, tokens=3)
    for far in (new * 1e3, keys * 1e3):
        found = swapped_keys(query, keys, far, values, gradient)
        expected = exact(query, keys, far, values, gradient, 0.5)
        assert bool(torch.isfinite(found).all())
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_small_swap_is_the_slope():
    """Of the whole screen: with little noise "+keys" is what the gradient says, with much not."""
    tracer = Tracer(tiny_pipeline("sd").to(torch.float64))
    found = {}
    for scale in (1e-5, 3.0):
        for name in ("plain", "plain+keys"):
            screen = tracer.screen(
                "a photo of a red dog",
                "dog",
                steps=2,
                by="token",
                metric="latent_distance",
                sites="attn2",
                estimator=name,
                corruption=_noise(scale),
            )
            keys = [r for r in screen.readings if r.part == "key"]
            values = [r for r in screen.readings if r.part == "value"]
            found[scale, name] = torch.tensor([screen.effects(r)[0].tolist() for r in keys])
            found[scale, name, "value"] = torch.tensor(
                [screen.effects(r)[0].tolist() for r in values]
            )
    assert bool(found[1e-5, "plain"].any())
    largest = float(found[1e-5, "plain"].abs().max())
    torch.testing.assert_close(
        found[1e-5, "plain"], found[1e-5, "plain+keys"], rtol=1e-3, atol=1e-3 * largest
    )
    assert not torch.allclose(found[3.0, "plain"], found[3.0, "plain+keys"], rtol=1e-2)
    for scale in (1e-5, 3.0):  # values are linear anyhow
        assert torch.equal(found[scale, "plain", "value"], found[scale, "plain+keys", "value"])


def _noise(scale: float):
    from fasttrace import Corruption

    return Corruption(scale=scale)
