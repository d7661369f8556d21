"""Compiles Triton kernels for sm_80, one request a line, in a process of its own.

Under pytest Triton's functions are made for its interpreter (tests/conftest.py says so before
Triton is imported), `tl.max` and the like among them, and those can't be compiled any more.

A request is the JSON of `launch.Request`, an answer {"ptx", "shared_size", "parameters"} or
{"error"}.
"""

import importlib
import json
import os
import sys
import traceback
from typing import Any


def compile_kernel(request: dict[str, Any]) -> dict[str, Any]:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = request["kernel"].partition(":")
    kernel = getattr(importlib.import_module(module), name)
    constants = {
        name: tl.dtype(value["dtype"]) if isinstance(value, dict) else value
        for name, value in request["constants"].items()
    }
    signature = {name: request["types"].get(name, "constexpr") for name in kernel.arg_names}
    divisible = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if name in request["divisible"]
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, divisible),
        target=GPUTarget("cuda", 80, 32),
        options=request["options"],
    )
    scratch = compiled.metadata.global_scratch_size
    if scratch:
        raise NotImplementedError(f"{name} wants {scratch} bytes of scratch memory")
    names = [name for name in kernel.arg_names if signature[name] != "constexpr"]
    return {
        "ptx": compiled.asm["ptx"],
        "shared_size": compiled.metadata.shared,
        "parameters": names,
    }


def main() -> None:
    # Answers have the pipe to themselves: whatever Triton prints goes where errors go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = compile_kernel(json.loads(line))
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
