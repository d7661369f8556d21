"""Who runs a compiled step: generated code, a captured CUDA graph, or torch's compiler."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fasttrace.errors import UsageError

RUNNERS = ("eager", "cudagraph", "compile")
Runner = Callable[[], None]  # makes one call


class CudaGraph:
    """The whole call captured once and replayed: tables, denoiser, guidance, next latent.

    All graphs of an engine share one memory pool, since they never run at the same time.
    """

    WARM_UP = 3

    def __init__(self, call: Callable[[], None], ground: Ground) -> None:
        self.call, self.ground = call, ground
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def __call__(self) -> None:
        with torch.cuda.device(self.ground.device):
            # The first calls are real ones on a side stream: libraries set themselves up and choose
            # their kernels there, and nothing is computed twice.
            if self.calls < self.WARM_UP:
                side = self.ground.stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    self.call()
                torch.cuda.current_stream().wait_stream(side)
                self.calls += 1
                return
            if self.graph is None:
                self.capture()
            self.graph.replay()  # type: ignore[union-attr]

    def capture(self) -> None:
        """Records the call and computes nothing: the call's work is the replay after it."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.ground.pool()):
            self.call()


class Ground:
    """What captured graphs that live at the same time share: a device, a pool, a side stream.

    When all of them have been dropped their pool is dead, and the next ones need another `Ground`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: torch.cuda._POOL_HANDLE | None = None
        self._stream: torch.cuda.Stream | None = None

    def pool(self) -> torch.cuda._POOL_HANDLE:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream


def check_runner(name: str, device: torch.device) -> None:
    """Raises `UsageError` for an unknown name and for CUDA graphs without a CUDA device."""
    if name not in RUNNERS:
        raise UsageError(f"Unknown runner {name!r}; expected one of {', '.join(RUNNERS)}.")
    if name == "cudagraph" and device.type != "cuda":
        raise UsageError("The runner 'cudagraph' needs a model on a CUDA device.")


def make_runner(name: str, call: Callable[[], None], ground: Ground) -> Runner:
    """`call` makes one call. "eager" and "compile" differ in the graphs that it runs, see `Step`.

    What torch's compiler makes computes in another order: within the noise floor, not on the bit.
    """
    return CudaGraph(call, ground) if name == "cudagraph" else call
