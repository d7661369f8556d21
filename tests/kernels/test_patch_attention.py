"""patch_attention in every form against numbers by hand and against the reference.

The Triton form runs in Triton's interpreter, whose matrix products are wrong in bfloat16: that one
is left to tests/ptx, which executes what was compiled.
"""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fasttrace_kernels
from fasttrace_kernels import attention_configs, reference
from fasttrace_kernels.patch_attention import fallback, fallback_maps, launch, launch_maps
from fasttrace_kernels.patch_attention_kernel import patch_attention_kernel
from fasttrace_kernels.specs import PATCH_ATTENTION
from fasttrace_kernels.testing import assert_same_bits, assert_within

NAN = float("nan")
FORMS = {
    "op": fasttrace_kernels.patch_attention,
    "fallback": fallback,
    "triton": launch,
}
MAPS_FORMS = {
    "op": fasttrace_kernels.patch_attention_maps,
    "fallback": fallback_maps,
    "triton": launch_maps,
}
TOLERANCE = PATCH_ATTENTION.tolerance


@pytest.fixture(params=FORMS)
def attend(request):
    return FORMS[request.param]


@pytest.fixture(params=MAPS_FORMS)
def attend_maps(request):
    return MAPS_FORMS[request.param]


@pytest.fixture(params=["fallback", "triton"])
def form(request):
    return SimpleNamespace(
        out=FORMS[request.param], maps=MAPS_FORMS[request.param], name=request.param
    )


@pytest.fixture
def poisoned(monkeypatch):
    """What Triton's form returns was NaN before, and so was the memory around it."""
    margins = []

    def empty(shape, dtype):
        size = math.prod(shape)
        memory = torch.full((size + 128,), NAN, dtype=dtype)
        margins.extend([memory[:64], memory[64 + size :]])
        return memory[64 : 64 + size].view(shape)

    def empty_like(query):
        lanes, heads, tokens, size = query.shape
        return empty((lanes, tokens, heads, size), query.dtype).transpose(1, 2)

    def empty_maps(query, key):
        return empty((*query.shape[:3], key.shape[2]), torch.float32)

    monkeypatch.setitem(launch.__globals__, "_empty_like", empty_like)
    monkeypatch.setitem(launch.__globals__, "_empty_maps", empty_maps)
    yield
    assert margins
    assert all(margin.isnan().all() for margin in margins)


def table(*values):
    return torch.tensor(values)


def draw(lanes=2, heads=2, tokens=5, keys=7, size=8, slots=None, dtype=torch.float32, seed=0):
    """query, key, value; scores so large that some keys count for more than others."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(lanes, heads, tokens, size)] + [(slots or lanes, heads, keys, size)] * 2
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


# softmax(ln 3, 0) = 3/4, 1/4 and softmax(0, ln 3) = 1/4, 3/4.
LOG3 = math.log(3)
QUERY = torch.tensor([[[[LOG3, 0.0], [0.0, LOG3]]], [[[0.0, 0.0], [0.0, 0.0]]]])
KEY = torch.eye(2).expand(2, 1, 2, 2)
VALUE = torch.tensor([[[[4.0, 8.0], [0.0, 4.0]]], [[[-4.0, 0.0], [-8.0, 2.0]]]])
OWN = torch.tensor([[[[3.0, 7.0], [1.0, 5.0]]], [[[-6.0, 1.0], [-6.0, 1.0]]]])
BY_HAND = {
    "own": ({}, OWN),
    "one slot for all": (
        {"kv_index": table(0, 0)},
        torch.tensor([[[[3.0, 7.0], [1.0, 5.0]]], [[[2.0, 6.0], [2.0, 6.0]]]]),
    ),
    "slots change places": (
        {"kv_index": table(1, 0)},
        torch.tensor([[[[-5.0, 0.5], [-7.0, 1.5]]], [[[2.0, 6.0], [2.0, 6.0]]]]),
    ),
    "lane 1 takes lane 0's": ({"index": table([-1], [0])}, OWN[[0, 0]]),
    "each takes the other's, no chains": ({"index": table([1], [0])}, OWN[[1, 0]]),
    "itself": ({"index": table([0], [1])}, OWN),
    "a token": (
        {"index": table([-1], [0]), "strength": table([1.0, 1.0], [0.0, 1.0])},
        torch.tensor([[[[3.0, 7.0], [1.0, 5.0]]], [[[-6.0, 1.0], [1.0, 5.0]]]]),
    ),
    "a part": (
        {"index": table([-1], [0]), "strength": table([0.5], [0.25])},
        torch.tensor([[[[3.0, 7.0], [1.0, 5.0]]], [[[-3.75, 2.5], [-4.25, 2.0]]]]),
    ),
    "the source's query with its slot": (
        {"index": table([1], [-1]), "kv_index": table(0, 0)},
        torch.tensor([[[[2.0, 6.0], [2.0, 6.0]]], [[[2.0, 6.0], [2.0, 6.0]]]]),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("of", ["reference", *FORMS])
def test_by_hand(of, name):
    function = {"reference": reference.patch_attention, **FORMS}[of]
    tables, want = BY_HAND[name]
    assert_within(function(QUERY, KEY, VALUE, **tables, scale=1.0), want, 1e-6)


@pytest.mark.parametrize("of", ["reference", *MAPS_FORMS])
def test_maps_by_hand(of):
    function = {"reference": reference.patch_attention_maps, **MAPS_FORMS}[of]
    tables = {"index": table([-1], [0]), "strength": table([1.0, 1.0], [0.0, 0.5])}
    out, maps = function(QUERY, KEY, VALUE, **tables, scale=1.0)
    want = torch.tensor([[[[0.75, 0.25], [0.25, 0.75]]], [[[0.5, 0.5], [0.375, 0.625]]]])
    assert_within(maps, want, 1e-6)
    assert_within(maps.mean(2), want.mean(2), 1e-6)
    assert_within(out[1, 0], torch.tensor([[-6.0, 1.0], [-2.5, 3.0]]), 1e-6)


def test_the_scale_is_that_of_the_head_unless_given(attend):
    query, key, value = draw(size=16)
    want = attend(query, key, value, scale=0.25)
    assert_same_bits(attend(query, key, value), want)
    with pytest.raises(AssertionError):
        assert_within(attend(query, key, value, scale=0.3), want, 1e-3)


# Tokens, keys, size of a head: each awkward value at least once, with whole and broken tiles.
SHAPES = [
    (1, 1, 8), (17, 77, 40), (64, 64, 64), (100, 130, 40), (64, 77, 80), (17, 81, 72), (1, 130, 96),
    (100, 16, 160), (17, 80, 128), (64, 96, 80), (17, 17, 96), (100, 77, 64), (1, 81, 160),
    (33, 33, 256), (5, 3, 3),
]  # fmt: skip


def tables(lanes, heads, tokens, slots, seed=0):
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(lanes, tokens, generator=generator).mul(1.6).sub(0.3)
    return {
        "kv_index": torch.randint(slots, (lanes,), generator=generator),
        "index": torch.randint(-1, lanes, (lanes, heads), generator=generator),
        "strength": strength.round(decimals=1).clamp(0, 1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_reference(poisoned, shape, dtype):
    tokens, keys, size = shape
    tensors = draw(3, 2, tokens, keys, size, slots=2, dtype=dtype)
    given = tables(3, 2, tokens, 2)
    want, want_maps = reference.patch_attention_maps(*tensors, **given)
    assert_within(launch(*tensors, **given), want, TOLERANCE[dtype])
    if keys <= 128:
        out, maps = launch_maps(*tensors, **given)
        assert_within(out, want, TOLERANCE[dtype])
        assert_within(maps, want_maps, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fallback_equals_reference(shape, dtype):
    tokens, keys, size = shape
    tensors = draw(3, 2, tokens, keys, size, slots=2, dtype=dtype)
    given = tables(3, 2, tokens, 2)
    want, want_maps = reference.patch_attention_maps(*tensors, **given)
    assert_within(fallback(*tensors, **given), want, TOLERANCE[dtype])
    if keys <= 128:
        out, maps = fallback_maps(*tensors, **given)
        assert_within(out, want, TOLERANCE[dtype])
        assert_within(maps, want_maps, TOLERANCE[torch.float32])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_tables(data):
    """Every form, every kind of table, few tokens."""
    lanes, heads, slots = (data.draw(st.integers(1, 3)) for _ in range(3))
    tokens, keys = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 5, 40, 85]))
    tensors = draw(lanes, heads, tokens, keys, 24, slots=slots, seed=data.draw(st.integers(0, 9)))
    kind = data.draw(st.sampled_from([torch.int32, torch.int64]))

    def fill(shape, values):
        size = math.prod(shape)
        numbers = data.draw(st.lists(values, min_size=size, max_size=size))
        return torch.tensor(numbers).reshape(shape)

    columns = data.draw(st.sampled_from([tokens, 1]))
    amounts = st.sampled_from([0.0, 1.0, 0.5, -1.0, 0.3])
    given = {
        "kv_index": fill((lanes,), st.integers(0, slots - 1)).to(kind),
        "index": fill((lanes, heads), st.integers(-1, lanes - 1)).to(kind),
        "strength": data.draw(st.none() | st.just(fill((lanes, columns), amounts))),
    }
    want = reference.patch_attention(*tensors, **given)
    for form in (launch, fallback):
        assert_within(form(*tensors, **given), want, TOLERANCE[torch.float32])


# numpy, in Triton's interpreter, speaks of the NaNs.
NAN_WARNINGS = pytest.mark.filterwarnings("ignore:(All-NaN|invalid value):RuntimeWarning")
LONG_AND_SHORT = pytest.mark.parametrize("keys", [77, 130], ids=["short", "long"])


@LONG_AND_SHORT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bits(form, keys, dtype):
    """What is whole is whole: a token's own result, or the source's, to the last bit."""
    tensors = draw(4, 3, 70, keys, 40, slots=2, dtype=dtype)
    kv_index = table(1, 0, 1, 0)
    nobody = torch.full((4, 3), -1)
    own = form.out(*tensors, kv_index, nobody)
    assert_same_bits(form.out(*tensors, kv_index, torch.zeros(4, 3).long(), torch.zeros(4, 1)), own)
    index = table([-1, 3, 0], [2, -1, -1], [3, 0, 2], [1, 1, 1])
    # Of lane 2 a whole tile is taken, of the next some tokens; of lane 3 some of each.
    strength = torch.zeros(4, 70)
    strength[0] = 1
    strength[2, :40] = 1
    strength[3, ::3] = 1
    want = own.clone()
    for lane in range(4):
        for head in range(3):
            if index[lane, head] >= 0:
                chosen = strength[lane] == 1
                want[lane, head, chosen] = own[index[lane, head], head, chosen]
    got = form.out(*tensors, kv_index, index, strength)
    assert_same_bits(got, want)
    assert (got[3] != own[3]).any(), "something was patched"
    taken = own[index.clamp(min=0), torch.arange(3)]
    everywhere = torch.where((index >= 0)[..., None, None], taken, own)
    assert_same_bits(form.out(*tensors, kv_index, index), everywhere)


@NAN_WARNINGS
@LONG_AND_SHORT
def test_what_is_not_taken_is_not_looked_at(form, keys):
    """A lane full of NaN, from its queries to its slot, that nobody takes anything from."""
    query, key, value = draw(3, 2, 40, keys, 40)
    want = form.out(query, key, value, None, table([-1, 2], [2, -1], [-1, -1]))
    for tensor in (query, key, value):
        tensor[0] = NAN
    index = table([-1, -1], [2, 0], [0, 0])
    strength = table([1.0], [1.0], [0.0]).repeat(1, 40)
    strength[1] = 0
    strength[1, 35] = 1
    got = form.out(query, key, value, None, index, strength)
    assert got[0].isnan().all()
    assert_same_bits(got[2], want[2])
    assert got[1, 1, 35].isnan().all(), "that token does take from it"
    assert got[1].isnan().sum() == 40
    # A token is taken from a source whose other tokens, and a lane whose own result, are NaN.
    query, key, value = draw(2, 1, 40, keys, 40)
    query[0, 0, 1:] = NAN
    value[1] = NAN
    strength = torch.zeros(2, 40)
    strength[1, 0] = 1
    got = form.out(query, key, value, None, table([-1], [0]), strength)
    assert got[1, 0, 0].isfinite().all()
    assert_same_bits(got[1, 0, 0], got[0, 0, 0])


@NAN_WARNINGS
def test_nan_of_a_source_arrives(form):
    query, key, value = draw(2, 1, 3, 7, 8)
    value[0] = NAN
    got = form.out(query, key, value, None, table([-1], [0]), table([0.0] * 3, [1.0, 0.5, 0.0]))
    assert got[1, 0].isnan().all(1).tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("keys", [33, 77, 80])
def test_long_path_against_short_path(monkeypatch, keys, dtype):
    tensors, given = draw(2, 2, 40, keys, 80, dtype=dtype), tables(2, 2, 40, 2)
    short = launch(*tensors, **given)
    monkeypatch.setattr(attention_configs, "SHORT_KEYS", 0)
    assert_within(launch(*tensors, **given), short, TOLERANCE[dtype])


@pytest.mark.parametrize("keys", [77, 130])
def test_far_scores(form, keys):
    """Scores of +-400: exp of them overflows, and of the others nothing is left."""
    query, key, value = draw(1, 1, 20, keys, 16)
    got = form.out(query * 100, key, value, scale=1.0)
    assert_within(got, reference.patch_attention(query * 100, key, value, scale=1.0), 1e-4)
    assert got.isfinite().all()


def test_the_layout_of_diffusers(form):
    """Heads within the channels of tokens: read in place, and the result's are one again."""
    generator = torch.Generator().manual_seed(0)
    flat = [torch.randn(2, size, 3 * 40, generator=generator) for size in (20, 77, 77)]
    heads = [x.view(2, -1, 3, 40).transpose(1, 2) for x in flat]
    out = form.out(*heads)
    assert_within(out, reference.patch_attention(*heads), TOLERANCE[torch.float32])
    again = out.transpose(1, 2).reshape(2, 20, 120)
    assert again.data_ptr() == out.data_ptr()
    assert out.shape == (2, 3, 20, 40)


STRIDES = {
    "contiguous": lambda x: x,
    "by token": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one of three": lambda x: x.repeat(1, 1, 1, 3)[..., 40:80],
    "odd rows": lambda x: torch.nn.functional.pad(x, (0, 3), value=NAN)[..., :40],
    "channels first": lambda x: x.mT.contiguous().mT,
    "every other lane": lambda x: torch.stack([x, torch.full_like(x, NAN)], 1).flatten(0, 1)[::2],
    "one for all lanes": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("of_keys", STRIDES)
def test_strides(poisoned, of_keys, dtype):
    """The kernel itself, in whose launcher the strides are worked out."""
    names = list(STRIDES)
    of_query, of_value = (names[(names.index(of_keys) + by) % len(names)] for by in (1, 2))
    tensors = draw(2, 2, 20, 33, 40, dtype=dtype)
    tensors = [
        STRIDES[name](x) for name, x in zip((of_query, of_keys, of_value), tensors, strict=True)
    ]
    given = tables(2, 2, 20, 2)
    given["index"] = torch.stack([given["index"]] * 2, -1)[..., 0]
    given["strength"] = given["strength"].T.contiguous().T
    got = launch(*tensors, **given)
    assert_within(got, reference.patch_attention(*tensors, **given), TOLERANCE[dtype])


def test_keys_far_apart_are_brought_together(monkeypatch):
    """Offsets of 32 bits don't reach them; 3 keys whose rows are 200 apart stand for such."""
    query, key, value = draw(1, 2, 5, 3)
    far = torch.full((1, 2, 3, 200), NAN)[..., :8]
    far[:] = key
    seen = []
    kernel = launch.__globals__["patch_attention_kernel"]

    class Kernel:
        def __getitem__(self, grid):
            def run(**given):
                seen.append(given["key_token_stride"] * given["ALIGN"])
                kernel[grid](**given)

            return run

    monkeypatch.setitem(launch.__globals__, "patch_attention_kernel", Kernel())
    want = launch(query, far, value)
    monkeypatch.setitem(launch.__globals__, "OFFSETS_END", 500)
    assert_same_bits(launch(query, far, value), want)
    assert seen == [200, 8]


def test_nothing_to_do(attend):
    for lanes, heads, tokens in ((0, 2, 3), (2, 0, 3), (2, 2, 0)):
        assert attend(*draw(lanes, heads, tokens)).shape == (lanes, heads, tokens, 8)


@NAN_WARNINGS
def test_triton_shows_an_index_that_no_host_checked():
    query, key, value = draw(5, 1, 3, 7, 8)
    own = launch(query, key, value)
    index = table([5], [-2], [-1], [4], [5])
    strength = table([1.0], [0.5], [1.0], [1.0], [0.0])
    got = launch(query, key, value, None, index, strength)
    assert got.isnan().all(-1).all(-1).flatten().tolist() == [True, True, False, False, False]
    assert_same_bits(got[2:], own[table(2, 4, 4)])
    got = launch(query, key, value, table(0, 5, -1, 2**40, 4), table([-1], [-1], [1], [0], [-1]))
    assert got.isnan().all(-1).all(-1).flatten().tolist() == [False, True, True, False, False]
    assert_same_bits(got[3], got[0])


def test_triton_runs_in_the_interpreter_here():
    assert type(patch_attention_kernel).__name__ == "InterpretedFunction"


@pytest.fixture
def launched(monkeypatch):
    """Constants of launches, on a made-up H100 whose assembler is of the version given."""
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: seen.append(arguments)

    def constants(version, size, keys, dtype=torch.float16, form=launch):
        module = sys.modules[launch.__module__]
        monkeypatch.setattr(module, "patch_attention_kernel", Kernel())
        monkeypatch.setattr(module, "architecture", lambda device: 90)
        monkeypatch.setattr(module, "ptxas_version", lambda: version)
        query, key = (torch.zeros(2, n, 3, size, dtype=dtype) for n in (70, keys))
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        form(query, key, key)
        (arguments,) = seen
        seen.clear()
        return arguments

    return constants


@pytest.mark.parametrize("size", [40, 80, 160])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_part_that_an_old_assembler_loses(launched, size, dtype):
    """tests/gpu met wrong results and illegal accesses; tests/machine_code sees the cause."""
    split = attention_configs.split(size)
    for version in ((12, 8), (0, 0)):
        text = launched(version, size, 77, dtype)
        assert not text["SHORT"]
        assert (text["D1"], text["D2"], text["TAIL_N"]) == (*split, 0)
        maps = launched(version, size, 77, dtype, form=launch_maps)
        assert maps["SHORT"]
        assert (maps["D1"], maps["D2"]) == attention_configs.padded(size)
    for version in ((12, 9), (13, 0)):
        text = launched(version, size, 77, dtype)
        assert text["SHORT"]
        assert (text["D1"], text["D2"]) == split


def test_a_head_that_is_not_aligned_is_one_part_for_an_old_assembler(launched):
    picture = launched((12, 8), 33, 900)
    assert (picture["D1"], picture["D2"], picture["ALIGN"]) == (64, 0, 1)
    assert launched((12, 9), 33, 900)["D2"] == 16
    for version in ((12, 8), (12, 9)):  # float32 has no tensor cores
        assert launched(version, 40, 900, torch.float32)["D2"] == 16
        whole = launched(version, 64, 77)
        assert whole["SHORT"]
        assert (whole["D1"], whole["D2"]) == (64, 0)
