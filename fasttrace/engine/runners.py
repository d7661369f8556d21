"""Who runs a compiled step: generated code, a captured CUDA graph, or torch's compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, fx

from fasttrace.errors import UsageError

RUNNERS = ("eager", "cudagraph", "compile")


class Runner(Protocol):
    """`denoise()` gives the prediction of the call's inputs, calling it makes the whole call."""

    def denoise(self) -> Tensor: ...

    def __call__(self) -> None: ...


class Eager:
    """The graph's generated code."""

    def __init__(
        self, module: fx.GraphModule, arguments: Sequence[Tensor], call: Callable[[], None]
    ) -> None:
        self.module, self.arguments, self.call = module, arguments, call

    def denoise(self) -> Tensor:
        prediction: Tensor = self.module(*self.arguments)[0]
        return prediction

    def __call__(self) -> None:
        self.call()


class Compiled(Eager):
    """`torch.compile` of the graph. It computes in another order: within the noise floor."""

    def __init__(
        self, module: fx.GraphModule, arguments: Sequence[Tensor], call: Callable[[], None]
    ) -> None:
        super().__init__(module, arguments, call)
        self.compiled = torch.compile(module, dynamic=False)

    def denoise(self) -> Tensor:
        prediction: Tensor = self.compiled(*self.arguments)[0]
        return prediction


class CudaGraph(Eager):
    """The whole call captured once and replayed: tables, denoiser, guidance, next latent.

    Never run on a GPU by us; see docs/engine.md for what is checked instead. All graphs of a
    process share one memory pool, since they never run at the same time.
    """

    pool: tuple[int, int] | None = None
    WARM_UP = 3

    def __init__(
        self, module: fx.GraphModule, arguments: Sequence[Tensor], call: Callable[[], None]
    ) -> None:
        super().__init__(module, arguments, call)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def __call__(self) -> None:
        # The first calls are real ones on a side stream: libraries set themselves up and choose
        # their kernels there, and nothing is computed twice.
        if self.calls < self.WARM_UP:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.call()
            torch.cuda.current_stream().wait_stream(side)
            self.calls += 1
            return
        if self.graph is None:
            # Capture records and computes nothing, so this call's work is the replay below.
            if CudaGraph.pool is None:
                CudaGraph.pool = torch.cuda.graph_pool_handle()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=CudaGraph.pool):
                self.call()
        self.graph.replay()


def make_runner(
    name: str,
    module: fx.GraphModule,
    arguments: Sequence[Tensor],
    call: Callable[[], None],
) -> Runner:
    """Raises `UsageError` for an unknown name and for CUDA graphs without CUDA tensors."""
    if name == "eager":
        return Eager(module, arguments, call)
    if name == "compile":
        return Compiled(module, arguments, call)
    if name == "cudagraph":
        if arguments[0].device.type != "cuda":
            raise UsageError("The runner 'cudagraph' needs a model on a CUDA device.")
        return CudaGraph(module, arguments, call)
    raise UsageError(f"Unknown runner {name!r}; expected one of {', '.join(RUNNERS)}.")
