"""UNet sites: found by place in the module tree, ordered and measured by one empty forward."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fasttrace.adapters.hooks import tensor_of
from fasttrace.errors import ModelError
from fasttrace.types import Site

KINDS = ("resnet", "attn1", "attn2", "ff")
WHOLE = {"attentions": "transformer", "up_blocks": "block"}  # parent -> kind of its members
_SITE = re.compile(
    r"(?:^|\.)(?:resnets\.\d+|attn1|attn2|ff|attentions\.\d+|up_blocks\.\d+|mid_block)$"
)
_WORDS = {"attn1": "self-attn", "attn2": "cross-attn", "ff": "ff"}


@dataclass(frozen=True)
class UnetSites:
    """The default set in execution order, and which of them read the text embedding directly.

    whole: transformers and up and middle blocks as single sites (their index comes behind). Down
    blocks are none: they also give skips, which a site's output does not hold.
    """

    sites: tuple[Site, ...]
    text_fed: frozenset[str]
    whole: tuple[Site, ...] = ()

    @property
    def every(self) -> tuple[Site, ...]:
        return self.sites + self.whole


def site_modules(unet: nn.Module) -> dict[str, nn.Module]:
    """Modules of all sites by name, in registration (not execution) order."""
    return {f"unet.{path}": m for path, m in unet.named_modules() if _SITE.search(path)}


def kind_of(path: str) -> str:
    parent, _, tail = path.rpartition(".")
    if tail.isdigit():
        return WHOLE.get(parent.rpartition(".")[2], "resnet")
    return "block" if tail == "mid_block" else tail


def discover(unet: Any, height: int, width: int, tokens: int) -> UnetSites:
    """Run the UNet once on the meta device and note what is called when, and with which shape.

    height, width: of the latents. `tokens`: length of the text. No weight is read, so the UNet may
    itself live on meta; its parameters are swapped for meta ones during the call and put back.
    """
    modules = site_modules(unet)
    seen: dict[str, tuple[int, ...]] = {}
    fed: set[str] = set()
    handles = []

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
            seen[name] = tuple(tensor_of(output).shape[1:])
            if kwargs.get("encoder_hidden_states") is not None and kind_of(name) in KINDS:
                fed.add(name)

        return hook

    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(note(name), with_kwargs=True))
        meta = torch.device("meta")
        state = {
            n: torch.empty_like(t, device=meta)
            for n, t in (*unet.named_parameters(), *unet.named_buffers())
        }
        with torch.no_grad():
            torch.func.functional_call(unet, state, (), _empty_inputs(unet, height, width, tokens))
    finally:
        for handle in handles:
            handle.remove()
    if not any(kind_of(name) in KINDS for name in seen):
        raise ModelError(
            "The UNet has none of the sites fasttrace knows (resnets, attn1, attn2, ff)."
        )
    # The default set first: the others' indices come behind it.
    names = sorted(seen, key=lambda name: kind_of(name) not in KINDS)
    found = [
        Site(name=name, kind=kind_of(name), component="unet", index=i, shape=seen[name])
        for i, name in enumerate(names)
    ]
    own = [site for site in found if site.kind in KINDS]
    return UnetSites(tuple(with_aliases(own)), frozenset(fed), tuple(found[len(own) :]))


def with_aliases(sites: list[Site]) -> list[Site]:
    """Add the paper's names (Basu et al. 2024, figures 3 and 4).

    `{down|mid|up}-{block}-resnet-{k}` counts inside the block. `self-attn-{i}-{stage}`,
    `cross-attn-{i}-{stage}` and `ff-{i}-{stage}` count through the stage (all down blocks, the
    middle, all up blocks) in execution order, from 0.
    """
    counts: Counter[str] = Counter()
    named = []
    for site in sites:
        parts = site.name.split(".")
        stage = parts[1].split("_")[0]
        if site.kind == "resnet":
            block = parts[2] if parts[2].isdigit() else "0"
            alias = f"{stage}-{block}-resnet-{parts[-1]}"
        else:
            word = _WORDS[site.kind]
            alias = f"{word}-{counts[word + stage]}-{stage}"
            counts[word + stage] += 1
        named.append(replace(site, aliases=(alias,)))
    return named


def _empty_inputs(unet: Any, height: int, width: int, tokens: int) -> dict[str, Any]:
    """One row of everything the UNet reads, on meta."""
    config = unet.config
    dtype = next(iter(unet.parameters())).dtype

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    text = config.cross_attention_dim
    if getattr(config, "encoder_hid_dim", None) is not None:
        text = config.encoder_hid_dim
    inputs: dict[str, Any] = {
        "sample": empty(1, config.in_channels, height, width),
        "timestep": torch.empty((), device="meta", dtype=torch.int64),
        "encoder_hidden_states": empty(
            1, tokens, text[0] if isinstance(text, tuple | list) else text
        ),
        "return_dict": False,
    }
    if getattr(config, "time_cond_proj_dim", None) is not None:
        inputs["timestep_cond"] = empty(1, config.time_cond_proj_dim)
    if getattr(config, "addition_embed_type", None) == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": empty(1, pooled), "time_ids": empty(1, 6)}
    return inputs
