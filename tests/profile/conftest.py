"""One profile of the tiny model for all tests that look at one."""

import pytest

from fasttrace import Tracer
from fasttrace.profile.measure import profile
from fasttrace.types import Probe

PROMPT = "a photo of a dog in the house"


@pytest.fixture(scope="session")
def traced(loaded):
    """A tracer of the tiny model and a plan of it."""
    tracer = Tracer(loaded("sd"))
    plan = tracer.plan(Probe(PROMPT, "dog"), steps=2, metric="latent_recovery")
    return tracer, plan


@pytest.fixture(scope="session")
def profiled(traced):
    return profile(*traced, seconds=0.02)
