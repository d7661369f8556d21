"""A denoiser of three products, whose FLOPs, bytes, sites and times are worked out on paper.

Two rows of 2 channels and 4x4 places, float32: a tensor of C channels is 2 C 16 4 = 128 C bytes.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fasttrace.engine.compiled import compile_denoiser
from fasttrace.profile.clock import Clock
from fasttrace.profile.instrument import Instruments
from fasttrace.profile.recorder import Layout, Recorder
from fasttrace.profile.sites import OTHER, Label, labels_of, owners
from fasttrace.profile.traffic import live_bytes

RESNET = "unet.down_blocks.0.resnets.0"
ATTENTION = "unet.down_blocks.0.attentions.0.attn2"
FEED = "unet.up_blocks.0.attentions.0.ff"
KINDS = {RESNET: "resnet", ATTENTION: "attn2", FEED: "ff"}
ROWS = 2


class Resnet(nn.Module):
    """3 channels out of 2, then a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.conv(x))


class Attention(nn.Module):
    """A bias a channel, out of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k = nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return x + self.to_k(encoder_hidden_states).reshape(-1, 3, 1, 1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([nn.Module()])
        self.resnets = nn.ModuleList()


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=2, sample_size=4)
        down, up = Block(), Block()
        down.resnets.append(Resnet())
        down.attentions[0].attn2 = Attention()
        up.attentions[0].ff = nn.Conv2d(3, 3, 1, bias=False)
        self.down_blocks, self.up_blocks = nn.ModuleList([down]), nn.ModuleList([up])
        self.conv_out = nn.Conv2d(3, 2, 1, bias=False)

    def forward(self, sample, timestep, encoder_hidden_states, **_):
        a = self.down_blocks[0].resnets[0](sample)
        attention = self.down_blocks[0].attentions[0].attn2
        b = attention(a, encoder_hidden_states=encoder_hidden_states)
        c = self.up_blocks[0].attentions[0].ff(b)
        return (self.conv_out(b + c),)


@pytest.fixture(scope="module")
def toy():
    def inputs(rows):
        return {
            "sample": torch.zeros(rows, 2, 4, 4),
            "timestep": torch.zeros(rows),
            "encoder_hidden_states": torch.zeros(rows, 1, 2),
        }

    return compile_denoiser(Denoiser(), inputs)


@pytest.fixture(scope="module")
def labels(toy):
    graph = toy.body.at(ROWS)
    return list(labels_of(graph, owners(toy.body.small, KINDS), KINDS).values())


def test_sites_flops_and_bytes(labels):
    """In execution order: (kind, operator, FLOPs, bytes)."""
    assert [(x.kind, x.op, x.flops, x.bytes) for x in labels] == [
        ("resnet", "convolution", 2 * 2 * 16 * 3 * 2, 256 + 24 + 384),
        ("resnet", "elementwise", 0, 384 + 384),
        ("attn2", "gather, cat", 0, 2 * ROWS * 3 * 4),
        ("attn2", "elementwise", 0, 384 + ROWS * 3 * 4 + 384),
        ("ff", "convolution", 2 * 2 * 16 * 3 * 3, 384 + 36 + 384),
        (OTHER, "elementwise", 0, 3 * 384),
        (OTHER, "convolution", 2 * 2 * 16 * 2 * 3, 384 + 24 + 256),
    ]


def test_a_sites_own_path(labels):
    assert [x.site for x in labels] == [RESNET, RESNET, ATTENTION, ATTENTION, FEED, "", ""]


def test_what_is_alive(toy):
    """The ff's input and output are alive together, and their sum with them: 3 tensors."""
    graph = toy.body.at(ROWS)
    assert max(live_bytes(graph)) == 3 * 384


class Counter(Clock):
    """Every reading is 10 ns after the one before."""

    def __init__(self) -> None:
        super().__init__()
        times = self.times
        self.now = 0

        def tick() -> None:
            self.now += 10
            times.append(self.now)

        self.tick = tick


def test_ticks_fall_between_operators(toy):
    """The instrumented graph gives the plain one's numbers; an interval for each label."""
    recorder = Recorder(Counter())
    instruments = Instruments(toy, KINDS, recorder)
    graph = toy.body.at(ROWS)
    timed = instruments.timed(graph, instruments.owner)
    values = {
        **toy.weights,
        "sample": torch.randn(ROWS, 2, 4, 4),
        **{name: torch.randn(4, 3, 1, 1) for name in graph.reads if name.startswith("text:")},
        **{name: torch.tensor([3, 1]) for name in graph.reads if name.startswith("slot:")},
    }
    layout = Layout("toy", timed.labels, {}, [graph])
    for call in range(3):
        with recorder.step(layout, call):
            recorder.clock.take()  # the step's own first reading: nothing lies before the graph
            found = timed.graph(values)["prediction"]
            recorder.clock.times.pop()  # the step's last reading takes the place of the graph's
        assert torch.equal(found, graph(values)["prediction"])
    recorder.settle()
    total = recorder.totals[timed.labels[0]]
    assert (total.calls, total.nanoseconds, total.flops) == (3, 30, 3 * timed.labels[0].flops)
    assert recorder.steps == 3
    assert [span.name for span in recorder.spans if span.kind == "op"] == [
        label.op for label in timed.labels
    ]  # of the first execution alone


def test_a_patch_counts_the_rows_it_patches():
    """Call 0 patches 3 rows at the point, call 1 none."""
    recorder = Recorder(Counter())
    label = Label("resnet", RESNET, "patch", "p", bytes=100, point=1)
    layout = Layout("step", (label,), {}, [])
    recorder.patched = torch.tensor([[7, 3], [7, 0]])
    for call in range(2):
        with recorder.step(layout, call):
            pass
    recorder.settle()
    assert recorder.totals[label].bytes == 300


def test_a_wrong_number_of_readings_is_no_profile():
    recorder = Recorder(Counter())
    layout = Layout("step", (Label("resnet"), Label("ff")), {}, [])
    with recorder.step(layout, 0):
        pass
    with pytest.raises(RuntimeError, match="1 intervals, 2 labels"):
        recorder.settle()


def test_a_failed_step_says_nothing():
    recorder = Recorder(Counter())
    layout = Layout("step", (Label("resnet"),), {}, [])
    with pytest.raises(MemoryError), recorder.step(layout, 0):
        raise MemoryError
    with recorder.step(layout, 0):
        pass
    recorder.settle()
    assert (recorder.steps, recorder.totals[Label("resnet")].calls) == (1, 1)


def test_reset_forgets_the_warm_up():
    recorder = Recorder(Counter())
    layout = Layout("step", (Label("resnet"),), {}, [])
    for _ in range(2):
        recorder.reset()
        with recorder.step(layout, 0):
            pass
        recorder.settle()
    assert (recorder.steps, recorder.totals[Label("resnet")].calls) == (1, 1)
    assert (recorder.layouts, layout.executions) == ([layout], 1)
    assert recorder.clock.ticks == 2
