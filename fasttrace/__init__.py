"""Where inside a text-to-image model does the knowledge of a concept sit?

Importing this module loads nothing heavy; the names below arrive on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "Corruption",
    "Edit",
    "Editor",
    "Metric",
    "PlanRequest",
    "Probe",
    "Replacement",
    "Source",
    "Tracer",
    "__version__",
    "load",
    "load_edit",
    "parse_plan",
    "read_plan",
    "record",
]

_HOMES = {
    "Activations": "fasttrace.store.activations",
    "Corruption": "fasttrace.types",
    "Edit": "fasttrace.edit.edit",
    "Editor": "fasttrace.edit.editor",
    "Metric": "fasttrace.types",
    "PlanRequest": "fasttrace.plan.request",
    "Probe": "fasttrace.types",
    "Replacement": "fasttrace.edit.phrases",
    "Source": "fasttrace.plan.sources",
    "Tracer": "fasttrace.tracer",
    "load": "fasttrace.adapters.load",
    "load_edit": "fasttrace.edit.export",
    "parse_plan": "fasttrace.plan.request",
    "read_plan": "fasttrace.plan.request",
    "record": "fasttrace.recording",
}

if TYPE_CHECKING:
    from fasttrace.adapters.load import load
    from fasttrace.edit.edit import Edit
    from fasttrace.edit.editor import Editor
    from fasttrace.edit.export import load_edit
    from fasttrace.edit.phrases import Replacement
    from fasttrace.plan.request import PlanRequest, parse_plan, read_plan
    from fasttrace.plan.sources import Source
    from fasttrace.recording import record
    from fasttrace.store.activations import Activations
    from fasttrace.tracer import Tracer
    from fasttrace.types import Corruption, Metric, Probe


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fasttrace' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
