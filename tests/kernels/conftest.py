"""The ways an op can run on a machine without a GPU, as one parameter: `form`."""

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
def run(form):
    """run(spec, **arguments) computes an op in the given form and leaves its arguments alone."""

    def run(spec: Spec, out: torch.Tensor, **arguments: torch.Tensor | None) -> torch.Tensor:
        if form == "compiled":
            return spec.op(out, **arguments)
        result = out.clone()
        {"fallback": spec.fallback, "triton": spec.launch}[form](result, **arguments)
        return result

    return run
