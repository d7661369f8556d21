"""Site lists without weights, for `fasttrace sites`."""

from __future__ import annotations

from collections.abc import Sequence

from fasttrace.types import Site


def list_sites(
    name: str, component: str = "unet", sites: str | Sequence[str] = "paper"
) -> list[Site]:
    """Sites of a known architecture, a pipeline folder or a hub id, in execution order.

    `name`: "sd14", "sd15", "openjourney", "sd21", "sdxl", "embedded", a folder, a hub id; only
    configurations are read, the modules live on the meta device. `component`: "unet" or
    "text_encoder". Raises `ModelError` for an unknown model, `UsageError` for unknown sites.
    """
    raise NotImplementedError
