"""Site paths in words, and where in the model's shape they stand."""

from __future__ import annotations

import re
from collections.abc import Iterable

KIND_WORDS = {
    "resnet": "ResNet",
    "attn1": "self-attention",
    "attn2": "cross-attention",
    "ff": "feed-forward",
    "transformer": "transformer",
    "block": "whole block",
    "attn": "self-attention",
    "mlp": "MLP",
    "hidden": "layer output",
    "swap": "cross-attention K/V",
}
COMPONENT_WORDS = {
    "unet": "UNet",
    "text_encoder": "Text encoder",
    "text_encoder_2": "Second text encoder",
}
ATTRIBUTES = ("object", "style", "colour", "action")  # this order first, others after them
# Their output includes what came in: restoring it replaces everything that passes there.
WHOLE_STREAM = ("resnet", "transformer", "block", "hidden")
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)")
_MODULE = re.compile(r"(resnets|attentions)\.(\d+)")
_TRANSFORMER = re.compile(r"transformer_blocks\.(\d+)")
_LAYER = re.compile(r"layers\.(\d+)")


def block(site: str) -> str:
    """ "down 2", "mid", "up 0"; empty where the path has none."""
    found = _BLOCK.search(site)
    if found:
        return f"{found[1]} {found[2]}"
    return "mid" if "mid_block" in site else ""


def depth(site: str, ups: int) -> int:
    """How far down the U: 0 at full resolution. `ups` is the number of up blocks."""
    found = _BLOCK.search(site)
    if found:
        return int(found[2]) if found[1] == "down" else ups - 1 - int(found[2])
    return ups if "mid_block" in site else 0


def up_blocks(sites: list[str]) -> int:
    """The number of up blocks that a list of UNet paths shows."""
    found = [_BLOCK.search(site) for site in sites]
    return 1 + max((int(m[2]) for m in found if m), default=0)


def layer(site: str) -> int | None:
    """The text-encoder layer of a path."""
    found = _LAYER.search(site)
    return int(found[1]) if found else None


def words(site: str, kind: str) -> str:
    """ "down 2, attention 1, cross-attention"; "layer 0, self-attention"."""
    what = KIND_WORDS.get(kind, kind)
    number = layer(site)
    if number is not None:
        return f"layer {number}, {what}"
    parts = [block(site)]
    module, transformer = _MODULE.search(site), _TRANSFORMER.search(site)
    if kind == "block":
        return f"{parts[0]}, {what}"
    if kind == "transformer" and module:
        return f"{parts[0]}, {what} {module[2]}"
    if module and module[1] == "attentions":
        parts.append(f"attention {module[2]}")
        if transformer and transformer[1] != "0":
            parts.append(f"block {transformer[1]}")
        parts.append(what)
    elif module:
        parts.append(f"{what} {module[2]}")
    else:
        return site
    return ", ".join(part for part in parts if part)


def in_order(groups: Iterable[str]) -> list[str]:
    """Groups once each: the four attributes first, then others as they came."""
    order = {attribute: i for i, attribute in enumerate(ATTRIBUTES)}
    return sorted(dict.fromkeys(groups), key=lambda g: order.get(g.split(",")[0], len(order)))


def components_in_order(components: Iterable[str]) -> list[str]:
    """The denoiser first: it is what the pictures of the page are about."""
    return sorted(dict.fromkeys(components), key=lambda c: (c.startswith("text"), c))


def component_words(component: str) -> str:
    return COMPONENT_WORDS.get(component, component)
