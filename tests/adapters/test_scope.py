"""Invariant 7: after a scope, also one that ends in an error, everything is as it was."""

import copy
import random

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from fasttrace.adapters.fingerprint import fingerprint
from fasttrace.adapters.scope import pipeline_modules, scope
from fasttrace.errors import ModelError
from fasttrace.testing.tiny import make_scheduler

LEGACY = np.random  # the global generator is what a scope has to put back


class Boom(Exception):
    pass


def snapshot(pipe):
    modules = {
        f"{n}.{k}": m for n, p in pipeline_modules(pipe).items() for k, m in p.named_modules()
    }
    rng = torch.get_rng_state(), random.getstate(), LEGACY.get_state()[1].tolist()
    flags = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cuda.flash_sdp_enabled(),
    )
    return {
        "modules": {k: id(m) for k, m in modules.items()},
        "training": {k: m.training for k, m in modules.items()},
        "hooks": {
            k: (list(m._forward_hooks), list(m._forward_pre_hooks)) for k, m in modules.items()
        },
        "forward": {k: m.__dict__.get("forward") for k, m in modules.items()},
        "processors": {k: id(getattr(m, "processor", None)) for k, m in modules.items()},
        "parameters": {
            f"{k}.{n}": (id(p), p.data_ptr(), p.requires_grad)
            for k, m in modules.items()
            for n, p in [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]
        },
        "weights": fingerprint(pipe),
        "scheduler": repr(sorted(copy.deepcopy(pipe.scheduler.__dict__).items(), key=str)),
        "scheduler object": id(pipe.scheduler),
        "rng": (rng[0].tolist(), rng[1], rng[2]),
        "flags": flags,
    }


def meddle(pipe):
    """Everything a trace or a careless metric could do to a pipeline and to the process."""
    pipe.unet.train()
    pipe.unet.requires_grad_(False)
    pipe.unet.conv_in.register_forward_hook(lambda *_: None)
    pipe.unet.conv_in.register_forward_pre_hook(lambda *_: None)
    pipe.unet.set_attn_processor(AttnProcessor())
    pipe.unet.mid_block.resnets[0] = nn.Identity()
    pipe.unet.conv_out.weight = nn.Parameter(torch.zeros_like(pipe.unet.conv_out.weight))
    pipe.text_encoder.register_buffer("extra", torch.zeros(1))
    pipe.unet.conv_in.forward = lambda x: x
    del pipe.vae.post_quant_conv
    pipe.scheduler.set_timesteps(7)
    pipe.scheduler = make_scheduler("DDIM")
    pipe.unet = nn.Identity()
    torch.rand(3), random.random(), LEGACY.rand()
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_flash_sdp(False)
    torch.set_default_dtype(torch.float64)


@pytest.mark.filterwarnings("ignore:Please use the new API settings")
@pytest.mark.parametrize("error", [False, True])
def test_everything_is_put_back(pipeline, error):
    pipeline.text_encoder.train()  # a mode that evaluation has to restore
    pipeline.scheduler.set_timesteps(4)
    pipeline.unet.down_blocks[0].resnets[0].conv1.weight.requires_grad_(False)
    before = snapshot(pipeline)
    try:
        with scope(pipeline):
            assert not pipeline.text_encoder.training
            assert not torch.is_grad_enabled()
            meddle(pipeline)
            if error:
                raise Boom
    except Boom:
        assert error
    after = snapshot(pipeline)
    pipeline.text_encoder.eval()
    for name, value in before.items():
        assert after[name] == value, name


def test_a_hook_of_the_users_survives(sd):
    calls = []
    handle = sd.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    try:
        with scope(sd):
            sd("a dog", num_inference_steps=1, output_type="latent")
        assert len(calls) == 1
        sd.unet.conv_in(torch.zeros(1, 4, 8, 8))
        assert len(calls) == 2
    finally:
        handle.remove()
    assert not sd.unet.conv_in._forward_hooks


def test_edited_weights_are_noticed_or_put_back(sd):
    weight = sd.unet.conv_out.weight
    before = weight.detach().clone()
    with scope(sd, keep_weights=True):
        weight.add_(1)
    assert torch.equal(weight, before)
    with pytest.raises(ModelError, match="1 weights were edited in place"), scope(sd):
        weight.add_(1)
    weight.data.copy_(before)


def test_an_edit_does_not_hide_an_error(sd):
    weight = sd.unet.conv_out.weight
    before = weight.detach().clone()

    def edit_and_fail():
        with scope(sd):
            weight.add_(1)
            raise Boom

    with pytest.raises(Boom):
        edit_and_fail()
    weight.data.copy_(before)
