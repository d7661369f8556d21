"""Every kernel as it ships, compiled: the golden file, and what must hold under any version.

Renew the golden file with `python -m bench.machine_code --write`, and look at its diff.
"""

import json

import pytest
import triton

from bench.machine_code import CU_COMPILES, GOLDEN, MEASURED, errors, nvcc_version
from bench.machine_code_table import PADDED, RENEW, differences, fewer

pytestmark = [pytest.mark.kernels_slow, pytest.mark.timeout(1600)]

TARGETS = [f"sm_{capability}" for capability in MEASURED]
NO_NVCC = "the .cu files are not compiled: there is no nvcc on the path"


@pytest.fixture(scope="session")
def cases(found):
    ((version, cases),) = found["triton"].items()
    assert version == triton.__version__
    return cases


@pytest.fixture(scope="session")
def golden():
    return json.loads(GOLDEN.read_text())


def shipped(cases, op, target, *words):
    """Names of the cases of an op that have all these words."""
    names = [
        name
        for name, targets in cases.items()
        if target in targets and not name.endswith(PADDED) and {op, *words} <= {*name.split()}
    ]
    assert names, f"no case is called {op} {words} for {target}"
    return names


def must_equal(golden, found, tool, version):
    known = golden[tool]
    if version not in known:
        pytest.skip(
            f"{tool} {version} is not in the golden file ({', '.join(known)} are), so only the "
            f"absolute targets were checked; add it with: {RENEW}"
        )
    changes = differences(known[version], found[tool][version])
    assert not changes, "\n".join(
        [
            f"machine code under {tool} {version} is not what the golden file has:",
            *changes,
            f"If that is meant, renew the file with: {RENEW}",
        ]
    )


def test_triton_kernels_equal_the_golden_file(found, cases, golden):
    must_equal(golden, found, "triton", triton.__version__)


@pytest.mark.skipif(nvcc_version() is None, reason=NO_NVCC)
def test_cuda_kernels_equal_the_golden_file(found, golden):
    must_equal(golden, found, "nvcc", nvcc_version())


def test_everything_compiles(found):
    assert list(errors(found)) == []


def test_nothing_spills(cases):
    spilling = [
        f"{name}, {target}"
        for name, targets in cases.items()
        for target in TARGETS
        if not name.endswith(PADDED)
        and target in targets
        and (targets[target]["spilled"] or targets[target]["local_accesses"])
    ]
    assert spilling == []


def test_no_register_is_read_that_nothing_writes(cases):
    """On sm_90 ptxas 12.8 has some, of which it makes descriptors; so launches avoid that form."""
    reading = [
        f"{name}, {target}"
        for name, targets in cases.items()
        for target in TARGETS
        if target in targets and targets[target]["unwritten"]
    ]
    assert reading == []


def test_every_architecture_has_the_shared_memory_that_is_asked_for(cases):
    for name, targets in cases.items():
        for target, figures in targets.items():
            if not name.endswith(PADDED):
                assert figures.get("fits", figures.get("blocks")), f"{name}, {target}"


@pytest.mark.parametrize(("size", "least"), [("40", 0.25), ("80", 0.37), ("160", 0.37)])
@pytest.mark.parametrize("keys", ["text", "picture"])
def test_fewer_tensor_core_instructions_than_padded(cases, size, least, keys):
    """On sm_80 the count; an instruction of sm_90 can be of many sizes, so there its work."""
    for target, figure in (("sm_80", "tensor_instructions"), ("sm_90", "tensor_macs")):
        name = f"patch_attention fp16 {size} {keys}"
        own, padded = cases[name][target], cases[name + PADDED][target]
        assert own["tensor_instructions"] > 0
        assert fewer(own, padded, figure) >= least, f"{name}, {target}"


@pytest.mark.parametrize("size", ["40", "80"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_two_blocks_an_sm(cases, size, dtype):
    blocks = {
        name: cases[name]["sm_80"]["blocks"]
        for name in shipped(cases, "patch_attention", "sm_80", dtype, size)
    }
    assert min(blocks.values()) >= 2, blocks


@pytest.mark.parametrize("size", ["64", "128"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_warp_group_instructions_on_sm_90(cases, size, dtype):
    for name in shipped(cases, "patch_attention", "sm_90", dtype, size):
        assert cases[name]["sm_90"]["tensor_unit"] == "HGMMA", name


def test_tensor_cores_are_left_to_halves(cases):
    """A float32 product would be rounded to TF32 there."""
    for target in TARGETS:
        for name in shipped(cases, "patch_attention", target, "fp32"):
            assert cases[name][target]["tensor_instructions"] == 0, name


@pytest.mark.parametrize("op", ["patch_rows", "guided_step"])
def test_memory_bound_kernels_load_128_bits(cases, op):
    for target in TARGETS:
        for name in shipped(cases, op, target):
            assert cases[name][target]["wide_loads"] >= 2, f"{name}, {target}"


@pytest.mark.skipif(nvcc_version() is None, reason=NO_NVCC)
def test_cuda_kernels_keep_everything_in_registers(found):
    (targets,) = found["nvcc"].values()
    assert {*targets} == {f"sm_{capability}" for capability in CU_COMPILES}
    for target in TARGETS:
        assert targets[target]
        for name, figures in targets[target].items():
            assert (figures["spilled"], figures["local_accesses"]) == (0, 0), f"{name}, {target}"
