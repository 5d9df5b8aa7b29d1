"""How much each layer of a GGUF file changes its input, measured by llama.cpp."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

from torch import Tensor
from torch.nn.functional import cosine_similarity

from secateur.errors import ArchitectureError
from secateur.exporting.gguf.llama_cpp import LlamaCpp, Node
from secateur.progress import Progress

_OUTPUT = re.compile(r"l_out-(\d+)")
"""llama.cpp's name of the output of a layer."""


def layer_influence(
    engine: LlamaCpp, layers: int, windows: Tensor, progress: Progress
) -> list[float]:
    """The mean over all tokens of 1 − cos(input, output) for each layer; of the first, infinity.

    Paper: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You
    Expect", arXiv:2403.03853. Deviation: llama.cpp gives the input of the first layer no name of
    its own, so that layer always stays.

    Args:
        engine: the file that runs.
        layers: its decoder layers.
        windows: token ids [windows, length].
        progress: receives every window.

    Raises:
        ArchitectureError: llama.cpp does not name the outputs of all layers of this architecture.
    """
    sums: defaultdict[int, float] = defaultdict(float)
    tokens: Counter[int] = Counter()
    last: dict[str, Tensor] = {}

    def wanted(node: Node) -> bool:
        return _OUTPUT.fullmatch(node.name) is not None

    def seen(node: Node) -> None:
        number = int(node.name.rpartition("-")[2])
        output = node.value().flatten(0, -2)
        if number:
            sums[number] += float((1 - cosine_similarity(last["output"], output)).double().sum())
        tokens[number] += len(output)
        last["output"] = output

    progress.start("influence of layers", len(windows))
    for _ in engine.run(windows, wanted, seen):
        progress.step()
    progress.finish()
    if set(tokens) != {*range(layers)}:
        raise ArchitectureError(
            f"llama.cpp names the outputs of {len(tokens)} of {layers} layers",
            where=engine.name_or_path,
            remedy="name the layers that stay: --layers-list 0-11,14",
        )
    return [float("inf"), *(sums[number] / tokens[number] for number in range(1, layers))]
