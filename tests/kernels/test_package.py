"""The package as a whole: with compiled ops, without them, without Triton, and its list of ops."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import fasttrace_kernels
from fasttrace_kernels import _registry, specs
from fasttrace_kernels.patch_rows import patch_rows_kernel

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, sys
HIDDEN = {hidden!r}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
import torch
import fasttrace_kernels as kernels
from fasttrace_kernels.specs import SPECS
from fasttrace_kernels.testing import assert_within
status = kernels.extension_status()
for spec in SPECS:
    for shape in spec.shapes.values():
        example = spec.example(shape, torch.float32, 0)
        forms = (spec.outcome(form, example) for form in (spec.op, spec.reference))
        for got, want in zip(*forms, strict=True):
            assert_within(got, want, spec.tolerance[torch.float32])
strength = torch.zeros(1, requires_grad=True)
out = kernels.patch_rows(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0]), strength)
out.sum().backward()
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fasttrace::")]
print(json.dumps(dict(
    loaded=status.loaded, sentence=status.sentence, gradient=strength.grad.item(), ops=names,
    triton="triton" in sys.modules,
)))
"""


def python(hidden=(), **environment):
    script = SCRIPT.format(hidden=list(hidden))
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_compiled_ops_are_in_use():
    status = fasttrace_kernels.extension_status()
    assert status.loaded, status.sentence


def test_works_without_the_compiled_ops():
    facts = python(FASTTRACE_NO_EXT="1")
    assert not facts["loaded"]
    assert "FASTTRACE_NO_EXT" in facts["sentence"]
    assert facts["gradient"] == 2.0


def test_works_without_triton():
    facts = python(hidden=["triton"])
    assert facts["loaded"], facts["sentence"]
    assert not facts["triton"]


def test_every_op_has_a_spec():
    """The one list kept by hand can't go stale: torch knows every op that importing defined."""
    stems = {name.removeprefix("fasttrace::").rstrip("_") for name in python()["ops"]}
    assert stems == {spec.name for spec in specs.SPECS}


def test_an_extension_that_was_not_built_is_explained(monkeypatch):
    monkeypatch.setattr(_registry, "_find", lambda name: None)
    assert "pip install --no-build-isolation" in _registry._load("libfasttrace_ops.so").sentence


def test_a_broken_extension_is_explained(monkeypatch, tmp_path):
    path = tmp_path / "libfasttrace_ops.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(_registry, "_find", lambda name: path)
    status = _registry._load(path.name)
    assert not status.loaded
    assert "libfasttrace_ops.so can't be loaded beside this torch" in status.sentence


LANGUAGE = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)
AS_IMPORTED = [dict(vars(one)) for one in LANGUAGE]


@pytest.fixture
def language():
    """Triton's interpreter leaves its own functions in `triton.language` where a device function
    was called by itself, and those can't be compiled."""
    for one, names in zip(LANGUAGE, AS_IMPORTED, strict=True):
        for name in [name for name in vars(one) if name not in names]:
            delattr(one, name)
        for name, value in names.items():
            if vars(one)[name] is not value:
                setattr(one, name, value)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp64"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.usefixtures("language")
def test_triton_compiles_for_the_chips(dtype, masked, capability):
    """With 128-bit loads and stores, for which the kernel's masks must not hide the alignment."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = triton.runtime.jit.JITFunction(patch_rows_kernel.fn)
    constants = {
        "HAS_MASK": masked,
        "WIDE": tl.float64 if dtype == "fp64" else tl.float32,
        "BLOCK": 1024,
    }
    pointers = {"index_ptr": "*i64", "strength_ptr": "*fp32", "mask_ptr": "*u8"}
    pointers |= {"out_ptr": f"*{dtype}", "source_ptr": f"*{dtype}"}
    signature = {
        name: pointers.get(name, "constexpr" if name in constants else "i32")
        for name in kernel.arg_names
    }
    aligned = {"out_ptr", "source_ptr", "row_size", "out_lane_stride", "source_row_stride"}
    divisible = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if name in aligned
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, divisible),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "enable_fp_fusion": False},
    )
    ptx = compiled.asm["ptx"]
    width = "v2.b64" if dtype == "fp64" else "v4.b32"
    assert f"ld.global.{width}" in ptx
    assert f"st.global.{width}" in ptx


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to compile csrc/*.cu")
@pytest.mark.parametrize("capability", [80, 90])
def test_nvcc_compiles_without_torch(capability, tmp_path):
    result = subprocess.run(
        [
            "nvcc",
            f"-arch=sm_{capability}",
            "-std=c++17",
            "-Werror=all-warnings",
            "-Xptxas=-v",
            "-c",
            str(ROOT / "csrc/patch_rows.cu"),
            "-o",
            str(tmp_path / "patch_rows.o"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = result.stderr
    assert report.count("0 bytes spill stores") == report.count("spill stores") > 0


def test_torch_is_new_enough_for_the_stable_abi():
    assert tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


def test_the_folder_kernels_is_not_mistaken_for_hugging_faces():
    """Their package is imported as `kernels`, and transformers looks whether it is there."""
    from importlib import metadata

    from transformers.utils.import_utils import is_kernels_available

    installed = any(name == "kernels" for name in metadata.packages_distributions())
    assert is_kernels_available() == installed
