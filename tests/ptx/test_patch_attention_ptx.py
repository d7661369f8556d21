"""The shipped patch_attention kernel, launched by its own launcher, as the PTX that sm_80 gets.

Beside tests/kernels, where Triton's interpreter runs the same source: here it is what was compiled,
in the configurations of sm_80, with tensor cores, asynchronous copies and the barriers between.
"""

import itertools

import pytest
import torch

from fasttrace_kernels.testing import assert_same_bits

from .fused_attention import MAPS_TOLERANCE, NAN, TOLERANCE, Example, error, exact

TEXT, PICTURE = 77, 130  # 64 + 16 at once; the online softmax, over tiles that 130 doesn't fill
PATHS = pytest.mark.parametrize("keys", [TEXT, PICTURE], ids=["text", "picture"])


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.kernels_slow)


def table(*values):
    return torch.tensor(values)


SIZES = (40, 64, 80, 128, 160, 33)
CASES = [(torch.float16, size) for size in SIZES]
CASES += [(torch.bfloat16, size) for size in (40, 80, 160)]
CASES += [slow(torch.bfloat16, size) for size in (64, 128, 33)]


@pytest.mark.parametrize(("dtype", "size"), CASES, ids=str)
@PATHS
def test_equals_float64(fused, keys, dtype, size):
    """Both blocks of 70 tokens, of which the second is not full; for 128 the only one."""
    example = Example(dtype, size, keys=keys, gap=8 if size % 8 == 0 else 3)
    tables = example.tables()
    got = fused.out(**example.tensors, **tables)
    want, _ = exact(**example.tensors, **tables)
    assert error(got, want) < TOLERANCE[dtype]
    assert fused.memory.was_written("out_ptr").all()
    own, _ = exact(**example.tensors, kv_index=tables["kv_index"])
    assert error(own, want) > 0.1, "nothing was patched"


@pytest.mark.parametrize("size", [40, 64, 80, 128, 160])
@PATHS
def test_without_a_table(fused, keys, size):
    """Which is a kernel of its own, and for some heads in another configuration."""
    example = Example(size=size, keys=keys, tokens=130, lanes=1, heads=2, slots=1)
    want, _ = exact(**example.tensors)
    assert error(fused.out(**example.tensors), want) < TOLERANCE[torch.float16]
    assert fused.memory.was_written("out_ptr").all()


@pytest.mark.parametrize("size", [40, 128])
def test_float32(fused, size):
    """No tensor cores, and 77 keys go by in tiles too: all at once need too many registers."""
    example = Example(torch.float32, size, tokens=35, lanes=2, heads=1, gap=4)
    tables = example.tables() | {"index": table([-1], [0])}
    want, _ = exact(**example.tensors, **tables)
    assert error(fused.out(**example.tensors, **tables), want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("size", [96, 256])
def test_larger_heads(fused, size):
    """Up to what the op takes, which is more than any model of today has."""
    example = Example(size=size, tokens=65, keys=70, lanes=2, heads=1)
    tables = example.tables() | {"index": table([-1], [0])}
    want, _ = exact(**example.tensors, **tables)
    assert error(fused.out(**example.tensors, **tables), want) < TOLERANCE[torch.float16]


# One key, one token; a tile that is full and one key more or less; several tiles.
LENGTHS = [(1, 1), (64, 80), (65, 81), (63, 16), (1, 17), (64, 128), (129, 63), (3, 193)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_any_length(fused, lengths):
    """In either order of the blocks: none needs another to have gone before."""
    tokens, keys = lengths
    example = Example(tokens=tokens, keys=keys)
    tables = example.tables()
    want, _ = exact(**example.tensors, **tables)
    outs = []
    for fused.kernel.backwards in (False, True):
        outs.append(fused.out(**example.tensors, **tables))
        assert error(outs[-1], want) < TOLERANCE[torch.float16]
    assert_same_bits(outs[1], outs[0])


@pytest.mark.parametrize(
    ("size", "keys"),
    [
        *itertools.product((40, 160), (77, 100)),
        *itertools.starmap(slow, itertools.product((64, 80, 128), (77, 100))),
        (40, 80),
        (40, 3),
    ],
)
def test_maps(fused, size, keys):
    example = Example(size=size, keys=keys)
    tables = example.tables()
    out, maps = fused.maps(**example.tensors, **tables)
    want, want_maps = exact(**example.tensors, **tables)
    assert error(out, want) < TOLERANCE[torch.float16]
    assert error(maps, want_maps) < MAPS_TOLERANCE
    assert fused.memory.was_written("maps_ptr").all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_maps_of_other_dtypes(fused, dtype):
    example = Example(dtype, tokens=35, lanes=2, heads=1)
    tables = example.tables() | {"index": table([-1], [0])}
    out, maps = fused.maps(**example.tensors, **tables)
    want, want_maps = exact(**example.tensors, **tables)
    assert error(out, want) < TOLERANCE[dtype]
    assert error(maps, want_maps) < MAPS_TOLERANCE


def test_maps_without_a_patch(fused):
    example = Example(lanes=2)
    _, maps = fused.maps(**example.tensors)
    _, want = exact(**example.tensors)
    assert error(maps, want) < MAPS_TOLERANCE


OPTIONS = {
    "no tables": {},
    "slots": {"kv_index": table(1, 1, 0)},
    "slots of 32 bits": {"kv_index": table(1, 1, 0).int()},
    "sources of 32 bits": {"index": table([-1, 2], [0, -1], [1, 0]).int()},
    "a strength a lane": {
        "index": table([-1, 2], [0, 2], [1, 0]),
        "strength": table([0.5], [-0.25], [1.0]),
    },
    "lanes take their own": {"index": table([0, -1], [1, 1], [-1, 2])},
    "a scale": {"scale": 0.3, "kv_index": table(0, 1, 0)},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("gap", [8, 3], ids=["aligned", "odd"])
@PATHS
def test_options(fused, keys, gap, name):
    given = OPTIONS[name]
    example = Example(keys=keys, slots=2 if "kv_index" in given else 3, gap=gap)
    want, _ = exact(**example.tensors, **given)
    assert error(fused.out(**example.tensors, **given), want) < TOLERANCE[torch.float16]


@PATHS
def test_strides(fused, keys):
    """One set of keys for every slot; heads apart; channels that are not neighbours."""
    example = Example(keys=keys)
    query, key, value = example.tensors.values()
    tensors = (query.contiguous(), key[:1].expand(key.shape), value.mT.contiguous().mT)
    tables = example.tables()
    want, _ = exact(*tensors, **tables)
    assert error(fused.out(*tensors, **tables), want) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("size", [40, *(slow(size) for size in (64, 80, 128, 160))])
@PATHS
def test_what_is_whole_is_whole(fused, keys, size):
    """A head without a source, and a token of strength 0, have their own result; a token of
    strength 1 the source's: to the last bit."""
    example = Example(size=size, keys=keys, tokens=140)
    tables = example.tables()
    index, strength = tables["index"], tables["strength"]
    strength[0, :64] = 1  # a block whose own result nobody wants
    strength[1, :64] = 0  # one that takes nothing
    own = fused.out(**example.tensors, **tables | {"index": torch.full_like(index, -1)})
    got = fused.out(**example.tensors, **tables)
    taken = own[index.clamp(min=0), torch.arange(example.heads)]
    share = torch.where(index[..., None] >= 0, strength[:, None], 0.0)
    assert {0.0, 1.0} < {*share.unique().tolist()}
    whole, keeps = (share == 1)[..., None], (share == 0)[..., None]
    want = torch.where(keeps, own, torch.where(whole, taken, got))
    assert_same_bits(got, want)
    assert (got != own).any(-1).equal(share != 0)


@PATHS
def test_what_is_not_taken_is_not_looked_at(fused, keys):
    """NaN in a lane, from its queries to its slot, stays in that lane."""
    example = Example(keys=keys, lanes=4, slots=4, tokens=140)
    clean = fused.out(**example.tensors)
    for tensor in example.tensors.values():
        tensor[0] = NAN
    # Lane 1 has no source, lane 2 takes nothing of lane 0, lane 3 a token of it; of head 1 none.
    index = table([-1, -1], [-1, -1], [0, 0], [0, -1])
    strength = torch.zeros(4, 140)
    strength[1] = strength[3, 100] = 1
    got = fused.out(**example.tensors, index=index, strength=strength)
    assert got[0].isnan().all()
    assert_same_bits(got[1:3], clean[1:3])
    assert_same_bits(got[3, 1], clean[3, 1])
    others = torch.arange(140) != 100
    assert_same_bits(got[3, 0, others], clean[3, 0, others])
    assert got[3, 0, 100].isnan().all(), "that token does take from it"


@PATHS
def test_what_is_read(fused, keys):
    """Seen from memory: a slot that no lane has, the queries of a block that is wholly taken, and
    those keys that its own pass would have read."""
    example = Example(keys=keys, lanes=2, slots=3, tokens=140)
    given = {"kv_index": table(0, 2), "index": table([-1, -1], [0, -1])}
    strength = torch.ones(2, 140)
    strength[1, 130] = 0.5
    fused.out(**example.tensors, **given, strength=strength)
    for name in ("key", "value"):
        read = fused.memory.was_read(f"{name}_ptr").all((2, 3))
        assert read.tolist() == [[True, True], [False, False], [True, True]]
        assert not fused.memory.was_read(f"{name}_ptr")[1].any()
    read = fused.memory.was_read("query_ptr")
    assert read[0].all()
    assert read[1, 1].all()
    assert not read[1, 0, :128].any(), "lane 0's result is taken there"
    assert read[1, 0, 128:].all(), "a token of this block keeps a part of its own"


@PATHS
@pytest.mark.parametrize("far", [2, -2, 2**40])
def test_an_index_that_no_host_checked_shows_itself(fused, keys, far):
    """As NaN, in that head or lane alone, and without reading what isn't there."""
    example = Example(keys=keys, lanes=2)
    clean = fused.out(**example.tensors)
    got = fused.out(**example.tensors, index=table([-1, far], [-1, -1]))
    assert got[0, 1].isnan().all()
    assert_same_bits(got[0, 0], clean[0, 0])
    assert_same_bits(got[1], clean[1])
    got = fused.out(**example.tensors, kv_index=table(far, 1))
    assert got[0].isnan().all()
    assert_same_bits(got[1], clean[1])


@PATHS
def test_far_scores(fused, keys):
    """Scores of some +-400: exp of them overflows, and of the others nothing is left."""
    example = Example(keys=keys)
    example.tensors["query"].mul_(60)
    tables = example.tables()
    got = fused.out(**example.tensors, **tables)
    want, _ = exact(**example.tensors, **tables)
    assert error(got, want) < TOLERANCE[torch.float16]
