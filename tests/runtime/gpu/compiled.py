"""Compiles the GPU's kernels without a GPU, and prints what each one takes, as JSON.

    python tests/runtime/gpu/compiled.py 90 bfloat16-one int4-many

A process of its own, because other tests interpret the same kernels.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from secateur.runtime.kernels.gpu import two_of_four_kernel
from secateur.runtime.kernels.gpu.bitmask_kernel import bitmask_expand, bitmask_product
from secateur.runtime.kernels.gpu.matrix import LANES, ROWS

VALUES = {"bfloat16": "*bf16", "float16": "*fp16", "int8": "*i8", "int4": "*u8"}
STORED = {"mask": "*u8", "starts": "*i64", "values": "", "code": "*u8", "exponent": "*i8"}
PRODUCT = {"x": "*bf16", "y": "*fp32", **STORED} | dict.fromkeys(
    ("rows", "columns", "tokens", "tiles", "tiles_each", "groups"), "i32"
)
PAIRS = {
    "x": "", "y": "*fp32", "packed": "", "meta": "*i16", "columns": "*i32",
} | dict.fromkeys(("rows", "quads", "width", "tokens", "tiles_each"), "i32")  # fmt: skip
EXPAND = {"out": "*bf16", **STORED} | dict.fromkeys(("rows", "columns", "tiles", "groups"), "i32")


def compiled(architecture: int, name: str) -> dict[str, Any]:
    """What a kernel takes on an architecture.

    `name` is values and `one`, `many` or `expand`; or values and `2:4` or `6:8`, and tokens.
    """
    values, how, *tokens = name.split("-")
    if tokens:
        constants = {
            "TOKENS": int(tokens[0]), "SPLIT": how == "6:8", "ROWS": two_of_four_kernel.ROWS,
            "QUADS": two_of_four_kernel.QUADS,
        }  # fmt: skip
        types = {**PAIRS, "x": VALUES[values], "packed": VALUES[values]}
        return made(two_of_four_kernel.two_of_four_product, types, constants, architecture)
    expands = how == "expand"
    constants = {
        "ROWS": ROWS, "LANES": LANES, "CODES": values == "int4",
        "GROUP": 64 if values == "int4" else 0,
    }  # fmt: skip
    if not expands:
        constants |= {"MANY": how == "many", "WIDE": False}
    kernel = bitmask_expand if expands else bitmask_product
    types = {**(EXPAND if expands else PRODUCT), "values": VALUES[values]}
    return made(kernel, types, constants, architecture)


def made(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int
) -> dict[str, Any]:
    """Compile a kernel for types of its arguments and constants."""
    types = types | dict.fromkeys(constants, "constexpr")
    places = {(list(types).index(key),): value for key, value in constants.items()}
    found = triton.compile(
        ASTSource(kernel, types, places), target=GPUTarget("cuda", architecture, 32)
    )
    return {**usage(found.asm["cubin"]), "shared": found.metadata.shared,
            "tensor_cores": "mma." in found.asm["ptx"]}  # fmt: skip


def usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack and local memory: what is spilled is there."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Triton announces changes of its next release
    print(json.dumps({name: compiled(int(sys.argv[1]), name) for name in sys.argv[2:]}))
