"""From a plan as data to plans of a loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fasttrace.errors import UsageError
from fasttrace.plan.plan import Plan
from fasttrace.plan.request import PlanRequest
from fasttrace.planner import Planner


def plans_of(planner: Planner, request: PlanRequest, folder: Path | None = None) -> list[Plan]:
    """One plan a component, all with one sigma. folder: where the plan's tensor files lie.

    Raises `UsageError` where the model runs in another dtype (nothing is converted) or where a word
    means no site of any component.
    """
    dtype = str(planner.model.dtype).removeprefix("torch.")
    if dtype != request.dtype:
        raise UsageError(
            f"The plan asks for {request.dtype}, and the pipeline's weights are {dtype}: fasttrace "
            "converts none. Load it with that dtype, or change the plan."
        )
    plans: list[Plan] = []
    corruption, sources = request.corruption.corruption(), request.asked_sources(folder)
    for component in request.components:
        rest: dict[str, Any] = {}
        if component == "text_encoder":
            rest = {"tokens": list(request.tokens)} if request.tokens else {}
        else:
            rest = {"branch": request.branch, "window": request.asked_windows()}
        seeds = request.probes_and_seeds()
        plans.append(
            planner.plan(
                list(seeds),
                component=component,
                sites=_words(planner, component, request),
                seeds=seeds,
                corruption=corruption,
                metric=list(request.metrics) or None,
                source=sources,
                base=request.base,
                **request.sampling(),
                **rest,
            )
        )
        corruption = plans[-1].corruption
    return plans


def _words(planner: Planner, component: str, request: PlanRequest) -> list[str]:
    """With several components each takes the words that mean something in it."""
    words = list(request.sites)
    if len(request.components) == 1 or words == ["paper"]:
        return words
    for word in words:
        if not any(_means_sites(planner, part, word) for part in request.components):
            planner.sites(component, word)  # refuses it and names what it may have meant
    found = [word for word in words if _means_sites(planner, component, word)]
    if not found:
        raise UsageError(f"The plan's sites name nothing of {component}: add one, or leave it out.")
    return found


def _means_sites(planner: Planner, component: str, word: str) -> bool:
    try:
        planner.sites(component, word)
    except UsageError:
        return False
    return True
