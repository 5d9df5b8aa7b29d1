"""Compiles the GPU's kernels without a GPU, and prints what each one takes, as JSON.

    python tests/runtime/gpu/compiled.py 90 bfloat16-one int4-few

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

from secateur.runtime.kernels.gpu import bitmask, integers

POINTERS = {"bfloat16": "*bf16", "float16": "*fp16"}
STORED = {"mask": "*u8", "starts": "*i64", "values": ""}
TYPES = {
    "one": {"x": "", "y": "*fp32", **STORED}
    | dict.fromkeys(("rows", "tokens", "tiles", "tiles_each"), "i32"),
    "expand": {"out": "", **STORED} | dict.fromkeys(("rows", "columns", "tiles"), "i32"),
    "round": {"x": "", "order": "*i32", "q": "*i8", "steps": "*fp32", "columns": "i32",
              "words": "i32"},
    "few": {"q": "*i8", "steps": "*fp32", "y": "*fp32", "codes": "*i8", "scales": "*fp32"}
    | dict.fromkeys(("rows", "words", "tokens", "words_each"), "i32"),
}  # fmt: skip


def compiled(architecture: int, name: str) -> dict[str, Any]:
    """What a kernel takes on an architecture.

    `name` is values and what is done: `one`, `many` or `expand` for the bitmask, `round`; `few` or
    `many` for int8, int4 and int4x2 (two scales for 64 columns).
    """
    values, how = name.split("-")
    if values.startswith("int"):
        tile = integers.FEW if how == "few" else integers.MANY
        runs = {"int8": 0, "int4": 1, "int4x2": 2}[values]
        constants = {
            "TOKENS": tile.tokens, "ROWS": tile.rows, "RUNS": runs, "PLAIN": False,
        }  # fmt: skip
        types = TYPES["few"] | ({"scales": "*bf16"} if runs else {})
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        weights, kernel = 64 * tile.rows, integers.integer_product
        return made(kernel, types, constants, architecture, weights, **options)
    if how == "round":
        weights, constants = 64 * integers.WORDS, {"WORDS": integers.WORDS}
        types = filled(TYPES["round"], values)
        return made(integers.rounded, types, constants, architecture, weights)
    constants = {"ROWS": bitmask.ROWS, "LANES": bitmask.LANES}
    weights = bitmask.ROWS * bitmask.COLUMNS
    if how == "expand":
        types = filled(TYPES["expand"], values)
        return made(bitmask.bitmask_expand, types, constants, architecture, weights)
    constants |= {"MANY": how == "many", "WIDE": False}
    types = filled(TYPES["one"], values)
    return made(bitmask.bitmask_product, types, constants, architecture, weights)


def filled(types: dict[str, str], values: str) -> dict[str, str]:
    """Types of arguments, those of activations and weights too."""
    return {name: kind or POINTERS[values] for name, kind in types.items()}


def made(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int,
    weights: int, num_warps: int = 4, num_stages: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """Compile a kernel for types of its arguments and constants.

    `weights` are those of a turn of its loop, or of a program if it has none.
    """
    pointers = [place for place, kind in enumerate(types.values()) if kind.startswith("*")]
    aligned = {(place,): [["tt.divisibility", 16]] for place in pointers}  # as all of torch's
    types = types | dict.fromkeys(constants, "constexpr")
    places = {(list(types).index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, types, places, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    target = GPUTarget("cuda", architecture, 32)
    found = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said_by(
            "cuobjdump", "--dump-resource-usage", file.name
        )))  # fmt: skip
        code = said_by("nvdisasm", "--print-code", file.name)
    return {
        "registers": int(usage["REG"]),
        "spilled": int(usage["STACK"]) + int(usage["LOCAL"]),
        "instructions": round(instructions(code) * num_warps * 32 / weights, 1),
        "shared": found.metadata.shared,
        "tensor_cores": "mma" in found.asm["ptx"],
    }


def instructions(code: str) -> int:
    """Instructions of a thread in the longest loop; in all if there is none.

    A loop ends with a branch to a label before it. One that jumps to itself is how a program ends.
    """
    labels: dict[str, int] = {}
    count, longest = 0, 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = count
        if re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\S", line):
            count += 1
            branch = re.search(r"BRA.*`\((\.L_\w+)\)", line)
            if branch and branch[1] in labels:
                longest = max(longest, count - labels[branch[1]])
    return longest if longest > 1 else count


def said_by(tool: str, *words: str) -> str:
    """What a tool that comes with Triton prints."""
    path = Path(nvidia.__file__).parent / "bin" / tool
    return subprocess.run([path, *words], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Triton announces changes of its next release
    print(json.dumps({name: compiled(int(sys.argv[1]), name) for name in sys.argv[2:]}))
