"""What torch asks of every op: a true schema, a fake kernel, autograd, and a place in a graph."""

import pytest
import torch

from fasttrace_kernels.specs import GUIDED_STEP, SPECS

SMALLEST = [(spec, next(iter(spec.shapes.values()))) for spec in SPECS]
LARGER = [(spec, list(spec.shapes.values())[-1]) for spec in SPECS]


def overloads(spec):
    """`name` and `name_`, whichever exist."""
    names = (name for name in (spec.name, f"{spec.name}_") if hasattr(torch.ops.fasttrace, name))
    found = [getattr(torch.ops.fasttrace, name).default for name in names]
    assert found, f"no op has the name {spec.name}"
    return found


def positional(overload, arguments):
    return tuple(arguments.get(argument.name) for argument in overload._schema.arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("spec", "shape"), [*SMALLEST, *LARGER], ids=lambda value: getattr(value, "name", str(value))
)
def test_opcheck(spec, shape):
    for overload in overloads(spec):
        arguments = positional(overload, spec.example(shape, torch.float32, 0))
        assert set(torch.library.opcheck(overload, arguments).values()) == {"SUCCESS"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck_without_guidance_and_noise():
    overload = torch.ops.fasttrace.guided_step_.default
    example = GUIDED_STEP.example((2, 3, 2, 4, 5), torch.float32, 0)
    example |= {"guidance": None, "noise": None, "weights": torch.ones(3, 5)}
    example |= {name: example[name][:2].clone() for name in ("prediction", "sample")}
    arguments = positional(overload, example)
    assert set(torch.library.opcheck(overload, arguments).values()) == {"SUCCESS"}


def test_guided_step_reads_no_value_while_traced():
    """Tensors without values go through, so the call may be captured."""
    example = GUIDED_STEP.example((2, 3, 2, 4, 5), torch.float32, 0)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in example.items()
        }
        assert GUIDED_STEP.op(**fake) is None


def test_one_traced_guided_step_serves_every_schedule():
    """Calls and tables are data: a graph traced with one schedule computes another."""
    from torch.fx.experimental.proxy_tensor import make_fx

    example = GUIDED_STEP.example((1, 2, 2, 4, 5), torch.float32, 0)
    names = [name for name, value in example.items() if isinstance(value, torch.Tensor)]

    def step(*tensors):
        arguments = dict(zip(names, tensors, strict=True))
        GUIDED_STEP.op(**arguments, latents=1)
        GUIDED_STEP.op(**arguments, latents=1)
        return arguments["state"] * 1

    graph = make_fx(step)(*(example[name].clone() for name in names))
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.fasttrace.guided_step_.default) == 2
    other = GUIDED_STEP.example((1, 2, 2, 4, 5), torch.float32, 1)
    other["counter"] = torch.tensor([0, 0])
    tensors = [other[name].clone() for name in names]
    got, want = graph(*tensors), step(*(other[name].clone() for name in names))
    assert torch.equal(got, want)
    assert tensors[names.index("counter")].tolist() == [2, 0]
    assert not torch.equal(want, step(*(example[name].clone() for name in names)))
