"""The estimates, against numbers worked out by hand."""

import pytest

from bench.roofline import (
    GPUS,
    Gpu,
    Work,
    attention,
    estimate,
    guided_step,
    markdown,
    parts,
    rows_patch,
    works,
)

SLOW = Gpu("slow", tensor_flops=1000.0, bytes=10.0, flops_per_exponential=100)


@pytest.mark.parametrize(
    ("size", "filled"),
    [(1, 16), (16, 16), (17, 32), (40, 48), (64, 64), (77, 80), (80, 80), (100, 128), (160, 160)],
)
def test_what_of_a_size_reaches_the_tensor_cores(size, filled):
    assert parts(size) == filled


def test_parts_are_those_of_the_kernel():
    from fasttrace_kernels.attention_configs import split

    for size in range(1, 257):
        assert parts(size) == sum(split(size)), size


def test_attention_by_hand():
    work = attention("", rows=2, heads=3, queries=5, keys=77, size=40)
    assert work.exponentials == 2 * 3 * 5 * 77
    assert work.flops == 2 * 3 * 5 * 77 * 40 * 4  # two products, a multiply and an add each
    assert work.tensor_flops == 2 * 3 * 5 * 80 * 48 * 4
    # Queries and results 5 x 40 each, keys and values 77 x 40 each, 2 bytes.
    assert work.bytes == 2 * 3 * (2 * 5 * 40 + 2 * 77 * 40) * 2


def test_many_keys_are_not_filled_up():
    work = attention("", rows=1, heads=1, queries=1, keys=4096, size=64)
    assert work.tensor_flops == work.flops == 4 * 4096 * 64


def test_self_attention_of_sd_15_by_hand():
    """32 rows, 8 heads, 4096 x 4096 scores, 40 (48) wide: 687 (825) GFLOP, 336 MB."""
    work = works()["SD 1.5, 512 x 512"][0]
    assert work.flops == pytest.approx(687.2e9, rel=1e-4)
    assert work.tensor_flops == pytest.approx(824.6e9, rel=1e-4)
    assert work.bytes == pytest.approx(335.5e6, rel=1e-3)
    a100, _, h100 = (estimate(work, gpu) for gpu in GPUS)
    assert a100.binds == "tensor cores"
    assert a100.seconds == pytest.approx(824.6e9 / 312e12, rel=1e-4)
    # 4.29e9 exponentials at 3.86e12 a second take longer than 825 GFLOP at 989.
    assert h100.binds == "exponentials"
    assert h100.seconds == pytest.approx(4.295e9 / 3.863e12, rel=1e-3)


def test_patched_rows_by_hand():
    work = rows_patch("", lanes=7, elements=10)
    assert (work.flops, work.bytes, work.tensor_flops) == (210, 420, 0)


def test_guided_step_by_hand():
    """PNDM-like: 2 latents, 4 predictions, so 5 kept. An element: two halves and 5 floats in, as
    much out; guidance 3, six products and five sums, one scale."""
    work = guided_step("", lanes=3, elements=10, latents=2, predictions=4)
    assert work.bytes == 30 * 2 * (2 * 2 + 5 * 4)
    assert work.flops == 30 * (3 + 6 + 5 + 1)


@pytest.mark.parametrize(
    ("work", "seconds", "binds"),
    [
        (Work("", 1, 2000.0, 10.0, 5), 2.0, "tensor cores"),
        (Work("", 1, 2000.0, 30.0, 5), 3.0, "memory"),
        (Work("", 1, 2000.0, 30.0, 50), 5.0, "exponentials"),
    ],
)
def test_the_slowest_side_binds(work, seconds, binds):
    found = estimate(work, SLOW)
    assert (found.seconds, found.binds) == (seconds, binds)


def test_exponentials_a_second():
    """16 a clock: 108 multiprocessors at 1.41 GHz, 132 at 1.83."""
    a100, _, h100 = GPUS
    assert a100.exponentials == pytest.approx(16 * 108 * 1.41e9, rel=1e-3)
    assert h100.exponentials == pytest.approx(16 * 132 * 1.83e9, rel=1e-3)


def test_ridge_by_hand():
    assert [round(gpu.ridge) for gpu in GPUS] == [201, 153, 295]


def test_table_calls_itself_an_estimate():
    assert markdown().count("An estimate.") == len(works())


def test_numbers_have_three_digits():
    row = next(line for line in markdown().splitlines() if "self, 8 heads of 40" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:6] == ["687", "825", "336", "2,050", "2,640 µs, tensor cores"]
