"""The ways an op can run on a machine without a GPU, as one parameter: `form`."""

from typing import Any

import pytest
import torch

import fasttrace_kernels
from fasttrace_kernels.specs import Spec

FORMS = ("compiled", "fallback", "triton")


@pytest.fixture(params=FORMS)
def form(request):
    if request.param == "compiled":
        status = fasttrace_kernels.extension_status()
        # Not a skip: whoever runs the tests has built the ops, or believes to have.
        assert status.loaded, f"the compiled ops are not in use: {status.sentence}"
    return request.param


@pytest.fixture
def function(form):
    """function(spec): the op in the given form, as something to call."""
    names = {"compiled": "op", "fallback": "fallback", "triton": "launch"}
    return lambda spec: getattr(spec, names[form])


@pytest.fixture
def run(function):
    """run(spec, **arguments) computes an op in the given form and leaves its arguments alone."""

    def run(spec: Spec, *out: torch.Tensor, **arguments: Any) -> Any:
        named = dict(zip(spec.written, out, strict=False))
        results = spec.outcome(function(spec), named | arguments)
        return results if len(results) > 1 else results[0]

    return run
