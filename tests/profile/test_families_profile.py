"""Profiles of every family."""

import pytest

from fasttrace import Tracer
from fasttrace.profile.measure import profile
from fasttrace.testing.tiny import FAMILIES
from fasttrace.types import Probe


@pytest.mark.parametrize("family", FAMILIES)
def test_a_profile(family, loaded):
    """Scores are those without the clock, shares add up, each site has a line."""
    tracer = Tracer(loaded(family))
    plan = tracer.plan(Probe("a photo of a dog", "dog"), steps=1, metric="latent_recovery")
    found = profile(tracer, plan, seconds=0.01)
    assert found.costs.same
    assert found.lanes == plan.lanes > 5
    assert found.work.executed == found.work.predicted > 0
    assert sum(line.share for line in found.kinds) == pytest.approx(1)
    assert {line.site for line in found.sites} == {site.name for site in tracer.sites()}
    kinds = {line.name for line in found.sites}
    assert kinds == {site.kind for site in tracer.sites()}
    assert ("added_kv" in kinds) == family.startswith("kandinsky")
    assert all(line.seconds > 0 and line.bytes > 0 for line in found.sites)
