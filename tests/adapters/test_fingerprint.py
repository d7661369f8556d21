"""One hash per model: stable, and different as soon as one weight is."""

import pytest
import torch

import fasttrace
from fasttrace.adapters.fingerprint import fingerprint, tensor_digest


def test_stable_over_runs_and_loads(tiny, folders):
    before = fingerprint(tiny)
    tiny("a dog", num_inference_steps=1, output_type="latent")  # tokenizers change state here
    assert fingerprint(tiny) == before
    folder = folders["sdxl" if hasattr(tiny, "text_encoder_2") else "sd"]
    assert fingerprint(fasttrace.load(str(folder))) == before


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_one_weight_changes_it(sd, part):
    before = fingerprint(sd)
    weight = list(getattr(sd, part).parameters())[-1].data.view(-1)
    kept = weight[-1].clone()
    weight[-1] = torch.nextafter(kept, torch.tensor(9.0))
    changed = fingerprint(sd)
    weight[-1] = kept
    assert changed != before
    assert fingerprint(sd) == before


def test_dtype_and_shape_count():
    zeros = torch.zeros(2, 3)
    digests = {tensor_digest(t) for t in (zeros, zeros.half(), zeros.bfloat16(), zeros.view(3, 2))}
    assert len(digests) == 4
    assert tensor_digest(torch.arange(6.0).view(2, 3).t()) == tensor_digest(
        torch.arange(6.0).view(2, 3).t().contiguous()
    )
    assert tensor_digest(torch.tensor(1.0)) != tensor_digest(torch.tensor(2.0))
