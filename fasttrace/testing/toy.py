"""A denoiser of three additions, so that every run of a trace can be worked out on paper."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fasttrace.adapters.text import Text
from fasttrace.adapters.unet import site_modules
from fasttrace.types import Sampling


class _Does(nn.Module):
    """A module that is one function of its input and of the text it may be given."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        return (
            self.function(x) if encoder_hidden_states is None else self._read(encoder_hidden_states)
        )

    def _read(self, text: Tensor) -> Tensor:
        return self.function(text.reshape(-1, 1, 1, 1))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attentions: Any = nn.ModuleList([nn.Module()])
        self.resnets: Any = nn.ModuleList()


class ToyDenoiser(nn.Module):
    """`h = 2 x + 3 text`, prediction `h + h + 2 x`: a ResNet, a cross-attention, a feed-forward.

    x [B, 1, 1, 1], text [B, 1, 1]. Sites: unet.down_blocks.0.resnets.0 gives a = 2 x, used twice
    (the stream and a skip); unet.down_blocks.0.attentions.0.attn2 gives b = 3 text;
    unet.up_blocks.0.attentions.0.ff gives c = a + b; the prediction is (a + b) + c + a.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=1, cross_attention_dim=1, sample_size=1)
        down, up = _Block(), _Block()
        down.resnets = nn.ModuleList([_Does(lambda x: 2 * x)])
        down.attentions[0].attn2 = _Does(lambda text: 3 * text)
        up.attentions[0].ff = _Does(lambda h: h.clone())
        self.down_blocks, self.up_blocks = nn.ModuleList([down]), nn.ModuleList([up])

    def forward(
        self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor]:
        down: Any = self.down_blocks[0]
        up: Any = self.up_blocks[0]
        a = down.resnets[0](sample)
        b = down.attentions[0].attn2(a, encoder_hidden_states=encoder_hidden_states)
        h = a + b
        c = up.attentions[0].ff(h)
        return (h + c + a,)


class ToyScheduler:
    """`x <- x - prediction`, as many times as there are steps."""

    init_noise_sigma = 1.0
    timesteps: Tensor

    def set_timesteps(self, steps: int, device: Any = None) -> None:
        self.timesteps = torch.arange(steps).flip(0)

    def scale_model_input(self, sample: Tensor, _timestep: Any) -> Tensor:
        return sample

    def step(
        self, prediction: Tensor, _timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        return (sample - prediction,)


class ToyModel:
    """What an engine asks of `fasttrace.adapters.pipeline.Model`, around a `ToyDenoiser`."""

    def __init__(self) -> None:
        self.unet = ToyDenoiser()
        self.dtype = torch.float32
        self.device = torch.device("cpu")

    def unet_modules(self) -> dict[str, nn.Module]:
        return site_modules(self.unet)

    def scheduler(self, steps: int) -> ToyScheduler:
        scheduler = ToyScheduler()
        scheduler.set_timesteps(steps)
        return scheduler

    def step_options(self, scheduler: Any, eta: float, generator: Any) -> dict[str, Any]:
        return {}

    def guided(self, sampling: Sampling) -> bool:
        return sampling.guidance > 1

    def guide(self, prediction: Tensor, sampling: Sampling) -> Tensor:
        if not self.guided(sampling):
            return prediction
        uncond, cond = prediction.chunk(2)
        return uncond + sampling.guidance * (cond - uncond)

    def conditioning(self, text: Text, sampling: Sampling, copies: int = 1) -> dict[str, Any]:
        halves = [h for h in (text.uncond, text.cond) if h is not None]
        return {"encoder_hidden_states": torch.cat([h for h in halves for _ in range(copies)])}
