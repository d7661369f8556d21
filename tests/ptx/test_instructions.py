"""Each opcode by itself, against numbers by hand, numpy, torch or exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from .faults import UnknownInstruction
from .handwritten import assemble, compute

INF, NAN = np.inf, np.nan


def f32(*numbers):
    return np.array(numbers, np.float32)


def u32(*numbers):
    return np.array(numbers, np.uint32)


def s32(*numbers):
    return np.array(numbers, np.int32)


def random(kind, count=32, seed=0):
    """Any bits at all, special values among them."""
    generator = np.random.default_rng(seed)
    return np.frombuffer(generator.bytes(count * np.dtype(kind).itemsize), kind)


INTEGERS = {
    "add.s32 d, a, b;": (s32(2**31 - 1, -5), s32(1, 3), s32(-(2**31), -2)),
    "sub.s32 d, a, b;": (s32(-(2**31), 2), s32(1, 3), s32(2**31 - 1, -1)),
    "mul.lo.s32 d, a, b;": (s32(2**30, -7), s32(4, 3), s32(0, -21)),
    "mul.hi.u32 d, a, b;": (u32(2**31, 7), u32(4, 3), u32(2, 0)),
    "mul.hi.s32 d, a, b;": (s32(-(2**31), -1), s32(4, 3), s32(-2, -1)),
    "div.s32 d, a, b;": (s32(7, -7, 7, -7), s32(2, 2, -2, -2), s32(3, -3, -3, 3)),
    "rem.s32 d, a, b;": (s32(7, -7, 7, -7), s32(2, 2, -2, -2), s32(1, -1, 1, -1)),
    "div.u32 d, a, b;": (u32(2**32 - 1, 7), u32(2, 2), u32(2**31 - 1, 3)),
    "min.s32 d, a, b;": (s32(-1, 4), s32(1, 3), s32(-1, 3)),
    "max.u32 d, a, b;": (u32(2**32 - 1, 4), u32(1, 5), u32(2**32 - 1, 5)),
    "and.b32 d, a, b;": (u32(12), u32(10), u32(8)),
    "or.b32 d, a, b;": (u32(12), u32(10), u32(14)),
    "xor.b32 d, a, b;": (u32(12), u32(10), u32(6)),
    "shl.b32 d, a, b;": (u32(3, 3, 3), u32(30, 32, 99), u32(3 << 30, 0, 0)),
    "shr.u32 d, a, b;": (u32(2**31, 2**31), u32(31, 32), u32(1, 0)),
    "shr.s32 d, a, b;": (s32(-8, -8, 8), s32(1, 40, 40), s32(-4, -1, 0)),
    "shf.l.wrap.b32 d, a, b, 8;": (u32(0x11223344), u32(0x55667788), u32(0x66778811)),
    "shf.r.clamp.b32 d, a, b, 8;": (u32(0x11223344), u32(0x55667788), u32(0x88112233)),
    "prmt.b32 d, a, b, 0x7531U;": (u32(0x33221100), u32(0x77665544), u32(0x77553311)),
    "prmt.b32 d, a, b, 0x0c80U;": (u32(0x00000080), u32(0x7F), u32(0x8000FF80)),
    "lop3.b32 d, a, b, 0x0f, 0xe8;": (u32(0x33), u32(0x55), u32(0x17)),  # the majority
}


@pytest.mark.parametrize("instruction", INTEGERS)
def test_integers(instruction):
    a, b, want = INTEGERS[instruction]
    assert compute(instruction, want.dtype, a=a, b=b).tolist() == want.tolist()


def test_other_integers():
    assert compute("neg.s32 d, a;", np.int32, a=s32(5, -3)).tolist() == [-5, 3]
    assert compute("abs.s32 d, a;", np.int32, a=s32(5, -3)).tolist() == [5, 3]
    assert compute("not.b32 d, a;", np.uint32, a=u32(0)).tolist() == [2**32 - 1]
    fields = compute("bfe.s32 d, a, 4, 8;", np.int32, a=u32(0xFF0, 0x7F0, 0xABCD))
    assert fields.tolist() == [-1, 127, 0xBC - 256]
    assert compute("bfe.u32 d, a, 4, 8;", np.uint32, a=u32(0xABCD)).tolist() == [0xBC]
    assert compute("bfe.s32 d, a, 24, 16;", np.int32, a=u32(0x80000000)).tolist() == [-128]
    assert compute("mad.lo.s32 d, a, a, 5;", np.int32, a=s32(3, -2)).tolist() == [14, 9]
    wide = compute("mul.wide.s32 d, a, a;", np.int64, a=s32(-(2**31)))
    assert wide.tolist() == [2**62]
    high = compute("mul.hi.s64 d, a, a;", np.int64, a=np.array([-(2**63)]))
    assert high.tolist() == [2**62]
    seven = np.array([7], np.int64)
    assert compute("mad.wide.u32 d, a, 8, c;", np.int64, a=u32(2**31), c=seven) == [2**34 + 7]


FLOATS = {
    "add.f32 d, a, b;": np.add,
    "sub.rn.f32 d, a, b;": np.subtract,
    "mul.f32 d, a, b;": np.multiply,
    "div.full.f32 d, a, b;": np.divide,
    "max.f32 d, a, b;": np.fmax,
    "min.f32 d, a, b;": np.fmin,
    "max.NaN.f32 d, a, b;": np.maximum,
}


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("instruction", FLOATS)
def test_floats(instruction):
    a, b = random(np.float32), np.concatenate([random(np.float32, 28, 1), f32(0, INF, NAN, 1)])
    want = FLOATS[instruction](a, b)
    np.testing.assert_array_equal(compute(instruction, np.float32, a=a, b=b), want)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_approximations_are_exact_here():
    x = f32(0.5, 2, 3, 1e-3, 100)
    for name, function in {
        "ex2.approx.ftz": np.exp2,
        "lg2.approx": np.log2,
        "sqrt.rn": np.sqrt,
        "rsqrt.approx": lambda x: 1 / np.sqrt(x),
        "rcp.approx.ftz": lambda x: 1 / x,
    }.items():
        got = compute(f"{name}.f32 d, a;", np.float32, a=x)
        np.testing.assert_array_equal(got, function(x.astype(np.float64)).astype(np.float32))
    assert compute("ex2.approx.f32 d, a;", np.float32, a=f32(-INF, INF)).tolist() == [0, INF]


def test_subnormals_are_flushed_when_asked():
    tiny = f32(1e-40, -1e-40)
    assert compute("add.f32 d, a, 0f00000000;", np.float32, a=tiny).tolist() == tiny.tolist()
    flushed = compute("mul.ftz.f32 d, a, 0f3F800000;", np.float32, a=tiny)
    assert flushed.view(np.uint32).tolist() == [0, 1 << 31]
    # A result that is subnormal counts too.
    assert compute("mul.ftz.f32 d, a, a;", np.float32, a=f32(1e-20)).tolist() == [0]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_fused_multiply_add_rounds_once(kind):
    """On numbers whose product and sum cancel, where rounding twice shows."""
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 32)).astype(kind)
    c = (-a * b).astype(kind) * kind(1 + np.finfo(kind).eps)
    c[16:] = generator.standard_normal(16).astype(kind) * kind(1e-4)
    got = compute(f"fma.rn.f{8 * a.itemsize} d, a, b, c;", kind, a=a, b=b, c=c)
    exact = [
        Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        for x, y, z in zip(a, b, c, strict=True)
    ]
    assert got.tolist() == [_rounded(number, kind) for number in exact]
    assert got.tolist() != (a * b + c).tolist()


def _rounded(number: Fraction, kind: type) -> float:
    """To nearest, among the neighbours of a first guess."""
    guess = kind(float(number))
    near = [np.nextafter(guess, kind(-INF)), guess, np.nextafter(guess, kind(INF))]

    def badness(x):
        return abs(Fraction(float(x)) - number), int(x.view(f"u{x.itemsize}")) & 1

    return float(min(near, key=badness))


def test_fused_multiply_add_is_not_rounded_to_float64_first():
    """1 + 2^-23 + 2^-24 - 2^-70 lies just below a tie; float64 can't tell, and would round up."""
    a, b, c = f32(2**-24 * (1 + 2**-23)), f32(1 - 2**-23), f32(1 + 2**-23)
    for sign in (f32(1), f32(-1)):
        got = compute("fma.rn.f32 d, a, b, c;", np.float32, a=sign * a, b=b, c=sign * c)
        assert got.tolist() == (sign * c).tolist()


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_fused_multiply_add_of_special_values():
    a, b, c = f32(INF, INF, 0, NAN, 1e38), f32(1, 0, 5, 1, 1e38), f32(1, 1, -0.0, 1, -INF)
    got = compute("fma.rn.f32 d, a, b, c;", np.float32, a=a, b=b, c=c)
    np.testing.assert_array_equal(got, f32(INF, NAN, 0, NAN, -INF))
    wide = compute("fma.rn.f64 d, a, a, a;", np.float64, a=np.array([INF, NAN, 1e308, 2.0]))
    np.testing.assert_array_equal(wide, [INF, NAN, INF, 6])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_halves(kind):
    """Arithmetic on pairs and alone; torch rounds a float32 result once."""
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    a, b, c = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    inputs = {name: x.view(torch.int32).numpy() for name, x in zip("abc", (a, b, c), strict=True)}
    for name, want in {
        "add": a + b,
        "mul": a * b,
        "sub": a - b,
        "max": torch.maximum(a, b),
    }.items():
        pairs = {n: inputs[n] for n in "ab"}
        got = compute(f"{name}.{kind}x2 d, a, b;", np.int32, **pairs)
        assert got.tolist() == want.view(torch.int32).tolist(), name
    got = compute(f"fma.rn.{kind}x2 d, a, b, c;", np.int32, **inputs)
    fused = (a.double() * b.double() + c.double()).to(dtype)  # exact in float64 at these sizes
    assert got.tolist() == fused.view(torch.int32).tolist()
    alone = {name: x.view(torch.int16).numpy()[:32] for name, x in zip("ab", (a, b), strict=True)}
    got = compute(f"add.{kind} d, a, b;", np.int16, **alone)
    assert got.tolist() == (a + b)[:32].view(torch.int16).tolist()


ROUNDED = f32(
    1,
    1 + 2**-8,
    1 + 3 * 2**-8,
    1 + 2**-11,
    1 + 3 * 2**-11,
    65519,
    65520,
    1e-7,
    -3e38,
    INF,
    NAN,
    -0.0,
)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_conversions_between_floats(kind):
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    x = np.concatenate([ROUNDED, random(np.float32, 20)])
    want = torch.from_numpy(x).to(dtype)
    got = torch.from_numpy(compute(f"cvt.rn.{kind}.f32 d, a;", np.int16, a=x)).view(dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    back = compute(f"cvt.f32.{kind} d, a;", np.float32, a=want.view(torch.int16).numpy())
    np.testing.assert_array_equal(back, want.float().numpy())
    # The first source is the upper half.
    pair = compute(f"cvt.rn.{kind}x2.f32 d, a, b;", np.uint32, a=f32(2), b=f32(1)).view(np.int16)
    assert torch.from_numpy(pair).view(dtype).tolist() == [1, 2]


def test_conversions_from_float64_round_once():
    # Just above a tie of float16 and bfloat16, by less than float32 can tell.
    above = np.array([1 + 2**-11 + 2**-40, 1 + 2**-8 + 2**-40])
    half = compute("cvt.rn.f16.f64 d, a;", np.float16, a=above[:1])
    assert half.tolist() == [1 + 2**-10]
    bits = compute("cvt.rn.bf16.f64 d, a;", np.uint16, a=above[1:]).astype(np.uint32)
    assert (bits << 16).view(np.float32).tolist() == [1 + 2**-7]
    assert compute("cvt.f64.f32 d, a;", np.float64, a=f32(0.1)).tolist() == [float(f32(0.1)[0])]


def test_conversion_to_tf32_rounds_ties_away():
    ulp = 2.0**-10
    got = compute(
        "cvt.rna.tf32.f32 d, a;", np.float32, a=f32(1 + ulp / 2, -1 - ulp / 2, 1 + ulp / 4)
    )
    assert got.tolist() == [1 + ulp, -1 - ulp, 1]


def test_conversions_with_integers():
    assert compute("cvt.s64.s32 d, a;", np.int64, a=s32(-5)).tolist() == [-5]
    assert compute("cvt.u64.u32 d, a;", np.int64, a=s32(-5)).tolist() == [2**32 - 5]
    assert compute("cvt.u32.u64 d, a;", np.uint32, a=np.array([2**33 + 7])).tolist() == [7]
    assert compute("cvt.s32.s8 d, a;", np.int32, a=s32(0x1FF)).tolist() == [-1]
    assert compute("cvt.rn.f32.s32 d, a;", np.float32, a=s32(2**24 + 1)).tolist() == [2**24]
    assert compute("cvt.rn.f64.u16 d, a;", np.float64, a=np.array([65535], np.uint16)) == [65535]
    x = f32(1.5, -1.5, 2.5, 3e9, -3e9, NAN)
    limits = [2**31 - 1, -(2**31), 0]
    assert compute("cvt.rzi.s32.f32 d, a;", np.int32, a=x).tolist() == [1, -1, 2, *limits]
    assert compute("cvt.rni.s32.f32 d, a;", np.int32, a=x).tolist() == [2, -2, 2, *limits]
    assert compute("cvt.rzi.u32.f32 d, a;", np.uint32, a=f32(-1, 3e9)).tolist() == [0, 3 * 10**9]
    assert compute("cvt.rmi.f32.f32 d, a;", np.float32, a=f32(-1.5, 1.5)).tolist() == [-2, 1]


COMPARED = f32(1, 2, NAN, 2), f32(2, 2, 2, NAN)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("lt", "1000"),
        ("le", "1100"),
        ("eq", "0100"),
        ("ne", "1000"),
        ("neu", "1011"),
        ("ltu", "1011"),
        ("geu", "0111"),
        ("num", "1100"),
        ("nan", "0011"),
    ],
)
def test_comparisons_of_floats(name, want):
    a, b = COMPARED
    got = compute(f"setp.{name}.f32 d, a, b;", np.bool_, a=a, b=b)
    assert "".join(str(int(x)) for x in got) == want


def test_comparisons_and_choice():
    a, b = s32(-1, 1), s32(1, 1)
    assert compute("setp.lt.s32 d, a, b;", np.bool_, a=a, b=b).tolist() == [True, False]
    assert compute("setp.lt.u32 d, a, b;", np.bool_, a=a, b=b).tolist() == [False, False]
    assert compute("setp.hi.u32 d, a, b;", np.bool_, a=a, b=b).tolist() == [True, False]
    yes = np.array([True, False])
    both = compute("setp.le.and.s32 d, a, b, c;", np.bool_, a=a, b=b, c=yes)
    assert both.tolist() == [True, False]
    opposite = compute("setp.lt.s32 %p1|d, a, b;", np.bool_, a=a, b=b)
    assert opposite.tolist() == [False, True]
    assert compute("selp.b32 d, a, 7, c;", np.int32, a=a, c=yes).tolist() == [-1, 7]
    assert compute("not.pred d, c;", np.bool_, c=yes).tolist() == [False, True]
    assert compute("and.pred d, c, c;", np.bool_, c=yes).tolist() == [True, False]


def test_moves():
    assert compute("mov.b32 d, 0fBF800000;", np.float32, a=f32(0)).tolist() == [-1]
    assert compute("mov.b64 d, 0d3FF8000000000000;", np.float64, a=f32(0)).tolist() == [1.5]
    halves = "{ .reg .b16 low, high; mov.b32 {low, high}, a; mov.b32 d, {high, low}; }"
    assert compute(halves, np.uint32, a=u32(0x12345678)).tolist() == [0x56781234]
    assert compute("ld.global.s8 d, [%rd1];", np.int32, a=s32(0x1FE)).tolist() == [-2]
    assert compute("ld.global.u8 d, [%rd1];", np.int32, a=s32(0x1FE)).tolist() == [254]
    assert compute("mov.b32 d, %laneid;", np.int32, a=np.arange(32)).tolist() == list(range(32))


def test_a_scope_has_registers_of_its_own():
    body = """
        .reg .pred p; setp.ne.s32 p, a, 5;
        { .reg .b16 a; mov.b16 a, 9; { .reg .b64 a; mov.b64 a, 8; } cvt.u32.u16 d, a; }
        @!p mov.b32 d, a;
    """
    got = compute(body, np.int32, a=s32(5, 6))
    assert got.tolist() == [5, 9]


def test_a_guard_masks():
    got = compute(
        "mov.b32 d, a; @c mov.b32 d, b;",
        np.int32,
        a=s32(1, 1),
        b=s32(2, 2),
        c=np.array([True, False]),
    )
    assert got.tolist() == [2, 1]
    # What a masked write leaves undefined is no number.
    left = compute("@c mov.b32 d, a;", np.float32, a=f32(1, 1), c=np.array([True, False]))
    assert left[0] == 1
    assert np.isnan(left[1])


REFUSED = {
    "frobnicate.b32 d, a;": "opcode frobnicate.b32 is not known; line .*`frobnicate.b32 d, a`",
    "add.sat.s32 d, a, a;": "opcode add.sat.s32 is not known with .sat",
    "add.rz.f32 d, a, a;": "add.rz.f32 is not known with .rz",
    "atom.global.xor.b32 d, [%rd1], 1;": "opcode atom.global.xor.b32 is not known",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {d}, {a}, {a}, {a};": "m16n8k32",
    "prmt.b32.f4e d, a, a, a;": "not known",
    "ld.global.acquire.gpu.b32 d, [%rd1];": ".acquire",
    ".local .b8 stack[16];": "the directive `.local .b8 stack.16.` is not known",
    "mov.b32 d, a+1;": "the operand `a.1` is not known",
}


@pytest.mark.parametrize("instruction", REFUSED)
def test_what_is_not_known_is_refused_by_name(instruction):
    with pytest.raises(UnknownInstruction, match=REFUSED[instruction]):
        compute(instruction, np.int32, a=s32(0))


def test_it_is_refused_even_where_it_is_never_reached():
    kernel = assemble("bra $end;\n// a comment\nfrobnicate.b32 %r1;\n$end:\nmov.b32 %r1, 0;")
    line = 1 + kernel.ptx.splitlines().index("frobnicate.b32 %r1;")
    with pytest.raises(UnknownInstruction, match=f"frobnicate.b32 is not known; line {line}: "):
        kernel.launch((1,), {"out": torch.zeros(1)})
