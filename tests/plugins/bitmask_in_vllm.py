"""Runs vLLM on a CPU as if it had a GPU: linears stay in the bitmask format, interpreted.

    echo '{"model": DIR, "prompts": [[1, 2]], "tokens": 2, "gain": 2.0}' | VLLM_PYTHON this file

It calls `benchmarks/speed/engines_vllm.py`; `gain` is what the pretended measurement says. The
line before the last of stdout is the number of linears that stayed packed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.speed import engines_vllm

if __name__ == "__main__":
    asked = json.load(sys.stdin)

    from secateur.plugins.vllm import packed
    from secateur.runtime.kernels.gpu import linear

    packed.runs_here = lambda: True
    linear.measured = lambda matrix, dtype: linear.KernelChoice(1, asked["gain"])
    made: list[Any] = []
    process = packed.BitmaskLinear.process_weights_after_loading

    def counted(self: Any, layer: Any) -> None:
        process(self, layer)
        made.append(self)

    packed.BitmaskLinear.process_weights_after_loading = counted
    engine = engines_vllm.engine_of(asked)
    tokens = engines_vllm.generated(engine, asked["prompts"], asked["tokens"])
    print("\n" + str(sum(one.dense is None for one in made)))
    print(json.dumps({"tokens": tokens}), flush=True)
