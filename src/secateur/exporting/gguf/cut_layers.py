"""Layers that leave a GGUF file. The others are numbered anew, and keep what they compute.

llama.cpp knows some properties of a layer from its tensors and from arrays with a value for each
layer. They go with the layer. Others follow from its number: windows, rotary positions, recurrence
and experts in a period, or the first layers. They are compared before and after, and a cut that
changes one is refused. A few constants follow from the number of all layers. Where llama.cpp has a
key for one, the key is written; where it has none, the cut is refused.

Layers that predict several tokens (`nextn_predict_layers`) are the last ones, and stay.

All rules are those of llama.cpp's `load_arch_hparams`, `load_arch_tensors` and graphs.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from gguf import GGUFValueType
from torch import Tensor
from torch.nn.functional import cosine_similarity

from secateur.errors import ArchitectureError, RecipeError
from secateur.exporting.gguf.cut_experts import IN_LAYER, check_numbers, refused
from secateur.exporting.gguf.edit import Edit, Kept
from secateur.exporting.gguf.llama_cpp import LlamaCpp, Node
from secateur.models.checkpoint import damaged
from secateur.models.gguf_file import BLOCKS, Field, GGUFSource
from secateur.progress import Progress

_refused = partial(refused, units="layers")
_NUMBERED = re.compile(r"\.\d+\.")

_PER_LAYER = frozenset(
    (
        "attention.head_count", "attention.head_count_kv", "feed_forward_length",
        "attention.sliding_window_pattern", "attention.rope_pattern", "attention.indexer.types",
        "attention.compress_ratios", "attention.recurrent_layers", "swiglu_clamp_exp",
        "swiglu_clamp_shexp", "deepstack_mapping", "activation_sparsity_scale",
    )
)  # fmt: skip
"""Arrays of the architecture with a value for each layer."""

_NOT_PER_LAYER = (
    "rope.dimension_sections", "classifier.output_labels", "adapters.token_ids_activate",
    "adapters.token_ids_substitute",
)  # fmt: skip
"""Arrays of the architecture that may be as long by chance."""

_PER_LAYER_EVERYWHERE = ("xielu.alpha_n", "xielu.alpha_p", "xielu.beta", "xielu.eps")

_NUMBERS = (
    "block_count", "nextn_predict_layers", "leading_dense_block_count", "hash_layer_count",
    "attention.shared_kv_layers", "context_length", "embedding_length", "attention.key_length",
    "embedding_length_per_layer_input", "full_attention_interval", "interleave_moe_layer_step",
    "moe_every_n_layers", "rescale_every_n_layers", "attn_res.block_size", "n_deepstack_layers",
    "attention.q_lora_rank", "expert_gating_func", "vocab_size", "attention.sliding_window",
)  # fmt: skip
"""Keys of the architecture that are read here."""

_FROM_THE_FIRST = ("leading_dense_block_count", "hash_layer_count")
"""Keys that count the first layers of a kind."""

_PERIODS: Mapping[str, tuple[int, int]] = {
    "afmoe": (4, 3), "cohere2": (4, 3), "cohere2moe": (4, 0), "exaone-moe": (4, 3),
    "exaone4": (4, 3), "gemma-embedding": (6, 5), "gemma2": (2, 1), "gemma3": (6, 5),
    "gemma3n": (5, 4), "gpt-oss": (2, 1), "laguna": (4, 0), "llama4": (4, 3), "mellum": (4, 3),
    "modern-bert": (3, 0), "muse-glimmer": (4, 3), "olmo2": (4, 3), "plamo3": (8, 7),
    "smallthinker": (4, 0),
}  # fmt: skip
"""The default period of sliding windows, and the place in it of the layer that sees everything."""

_READ_ARRAYS = ("cohere2moe", "mellum", "muse-glimmer")
"""Of these, the architectures that may have an array instead of a period."""

_WITHOUT_ROTATION = {"llama4": 3, "afmoe": 3, "smollm3": 3, "smallthinker": 0}
"""The place of the layer without rotary positions among each four."""

_FULL_ATTENTION = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "minimax-01": 8}
"""Every so many layers attend, and the others are recurrent."""

_RECURRENT = re.compile(r"(ssm|shortconv|time_mix)[._]")
"""Tensors of a recurrent layer."""

_FIRST = {"gemma3n": (10, 20), "rwkv7": (1,), "arwkv7": (1,)}
"""Layers before these numbers are computed otherwise than those behind."""


_OUTPUT = re.compile(r"l_out-(\d+)")
"""llama.cpp's name of the output of a layer."""


@dataclass(frozen=True)
class FileLayers:
    """The layers of a file.

    Attributes:
        source: the file.
        count: of the decoder layers, without those that predict several tokens.
        predicting: layers that predict several tokens.
    """

    source: GGUFSource
    count: int
    predicting: int

    @classmethod
    def of(cls, source: GGUFSource) -> FileLayers:
        """The layers of a file.

        Raises:
            ArchitectureError: it has none that can be cut.
            CheckpointError: the file contradicts itself.
        """
        check_numbers(source, _NUMBERS)
        for name in _PER_LAYER:
            if isinstance(source.get(name), str | list):
                raise damaged(f"{source.architecture}.{name} has texts", source.file)
        count, predicting = (
            int(source.get(name) or 0) for name in ("block_count", "nextn_predict_layers")
        )
        if count <= predicting or source.get("target_layers") is not None:
            raise _refused("it has no decoder layers of its own", str(source.file))
        for name in source.tensors:
            match = IN_LAYER.fullmatch(name)
            if not match and _NUMBERED.search(name):
                raise _refused("the layers of this kind are not understood", name)
            if match and int(match[1]) >= count:
                raise damaged(f"{name} belongs to none of the {count} layers", source.file)
        by_number = source.get("attention.indexer.types") is None
        long = int(source.get("context_length") or 0) >= 2**20
        if source.architecture == "glm-dsa" and by_number and long:
            raise _refused("llama.cpp knows by number which layers index", "glm-dsa")
        return cls(source, count - predicting, predicting)

    def influence(self, engine: LlamaCpp, windows: Tensor, progress: Progress) -> list[float]:
        """The mean over all tokens of 1 − cos(input, output) for each layer.

        Paper: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than
        You Expect", arXiv:2403.03853. Deviation: llama.cpp gives the input of the first layer no
        name of its own, so that layer gets infinity and always stays.

        Args:
            engine: the file that runs.
            windows: token ids [windows, length].
            progress: receives every window.

        Raises:
            ArchitectureError: llama.cpp does not name the outputs of all layers.
        """
        sums: defaultdict[int, float] = defaultdict(float)
        tokens: Counter[int] = Counter()
        last: dict[str, Tensor] = {}

        def seen(node: Node) -> None:
            number = int(node.name.rpartition("-")[2])
            output = node.value().flatten(0, -2)
            if number:
                sums[number] += float(
                    (1 - cosine_similarity(last["output"], output)).double().sum()
                )
            tokens[number] += len(output)
            last["output"] = output

        for _ in engine.run(
            windows, lambda node: bool(_OUTPUT.fullmatch(node.name)), seen, progress=progress
        ):
            pass
        if set(tokens) != {*range(self.count)}:
            raise ArchitectureError(
                f"llama.cpp names the outputs of {len(tokens)} of {self.count} layers",
                where=engine.name_or_path,
                remedy="name the layers that stay: --layers-list 0-11,14",
            )
        return [float("inf"), *(sums[number] / tokens[number] for number in range(1, self.count))]

    def best(self, scores: Sequence[float], count: int) -> tuple[int, ...]:
        """The layers that stay when those with the lowest sum of scores go.

        Of all cuts that leave every layer its role, by dynamic programming over the layers: the
        best loss for each number of layers that stay so far.

        Args:
            scores: of each layer; the higher, the more it is needed.
            count: of the layers that stay.

        Raises:
            RecipeError: no cut to so many layers is possible.
        """
        needed, get = _needed(self, range(self.count)), self.source.get
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
        for number, score in enumerate(scores):
            role, score = _role(self, number, self.count, get), min(score, 1e9)
            following: dict[int, tuple[float, tuple[int, ...]]] = {}
            for stay, (loss, kept) in best.items():
                ways = [] if number in needed else [(stay, (loss + score, kept))]
                if role == _role(self, stay, count, get):
                    ways.append((stay + 1, (loss, (*kept, number))))
                for after, way in ways:
                    following[after] = min(following.get(after, way), way)
            best = following
        if count not in best:
            what = (
                f"no {count} of {self.count} layers can stay as they are, but {sorted(best)[-8:]}"
            )
            raise _impossible(self, what, "keep one of these numbers")
        return best[count][1]


def cut_layers(source: GGUFSource, edit: Edit, kept: Sequence[int]) -> Edit:
    """Keep some decoder layers.

    Args:
        source: the file.
        edit: what happens to it.
        kept: their numbers in the source, without the layers that predict several tokens.

    Raises:
        ArchitectureError: layers of this file cannot be cut.
        RecipeError: llama.cpp would compute a layer that stays otherwise.
    """
    layers = FileLayers.of(source)
    kept = sorted(kept)
    if not kept or len(set(kept)) < len(kept) or kept[0] < 0 or kept[-1] >= layers.count:
        what = f"the layers are {kept[:8]}, and the file has {layers.count}"
        raise _impossible(layers, what, "name layers that are there, each once")
    last = range(layers.count, layers.count + layers.predicting)
    numbers = {old: new for new, old in enumerate((*kept, *last))}
    changed = _changed_fields(layers, numbers)
    _check_roles(layers, kept, changed)
    _check_kinds(layers, kept)
    for number, why in _needed(layers, kept).items():
        if number not in numbers:
            raise _impossible(layers, f"layer {number} has to stay: {why}", f"keep layer {number}")
    tensors = {}
    for name, one in edit.tensors.items():
        match = IN_LAYER.fullmatch(name)
        if match is None:
            tensors[name] = _narrowed(layers, one, numbers)
        elif int(match[1]) in numbers:
            tensors[f"blk.{numbers[int(match[1])]}.{match[2]}"] = one
    return replace(edit, fields={**edit.fields, **changed}, tensors=tensors)


def _changed_fields(layers: FileLayers, numbers: Mapping[int, int]) -> dict[str, Field]:
    """The metadata that counts layers or has a value for each."""
    source, start = layers.source, f"{layers.source.architecture}."
    fields, changed = source.fields, {}
    changed[f"{start}block_count"] = fields[f"{start}block_count"].like(len(numbers))
    for rest in _FROM_THE_FIRST:
        if source.get(rest):
            before = sum(old < source.get(rest) for old in numbers)
            changed[start + rest] = fields[start + rest].like(before)
    if shared := source.get("attention.shared_kv_layers"):
        name = f"{start}attention.shared_kv_layers"
        after = sum(old >= layers.count - shared for old in numbers)
        changed[name] = fields[name].like(after)
    lengths = {layers.count, layers.count + layers.predicting}
    for name, field in fields.items():
        rest = name.removeprefix(start)
        known = rest in _PER_LAYER if name.startswith(start) else name in _PER_LAYER_EVERYWHERE
        other = not name.startswith(start) or rest in _NOT_PER_LAYER
        if field.items is None or not (known or (not other and len(field.value) in lengths)):
            continue
        if len(field.value) < layers.count:
            raise damaged(f"{name} has {len(field.value)} values for {layers.count}", source.file)
        stay = [old for old in numbers if old < layers.count]
        stay += range(layers.count, len(field.value))
        changed[name] = picked(field, stay)
    return changed | _written_out(layers, numbers)


def picked(field: Field, places: Sequence[int]) -> Field:
    """Some entries of an array, of texts or of numbers."""
    values = field.value
    if isinstance(values, np.ndarray):
        return field.like(values[list(places)])
    return field.like([values[place] for place in places])


def _written_out(layers: FileLayers, numbers: Mapping[int, int]) -> dict[str, Field]:
    """Keys for what llama.cpp would derive from the number of layers otherwise."""
    source, start = layers.source, f"{layers.source.architecture}."
    found = {}
    if source.architecture == "minicpm" and source.get("residual_scale") is None:
        scale = 1.4 / math.sqrt(layers.count)
        found["residual_scale"] = Field(GGUFValueType.FLOAT32, scale)
    if source.architecture in _FULL_ATTENTION and source.get("attention.recurrent_layers") is None:
        recurrent = [old < layers.count and _recurrent(layers, old) for old in numbers]
        by_number = [_recurrent(layers, new) for new in range(len(numbers) - layers.predicting)]
        if recurrent[: len(by_number)] != by_number:
            kind = GGUFValueType.ARRAY
            found["attention.recurrent_layers"] = Field(
                kind, np.array(recurrent), GGUFValueType.BOOL
            )
    named = {start + rest: field for rest, field in found.items()}
    return named | keys_of_deepseek2(source)


def keys_of_deepseek2(source: GGUFSource) -> dict[str, Field]:
    """Keys for what llama.cpp derives from the numbers of layers and tokens, of this architecture.

    Raises:
        ArchitectureError: the file has no layers.
        CheckpointError: the file contradicts itself.
    """
    found = {}
    if source.architecture == "deepseek2":
        count = FileLayers.of(source).count
        if _lite(source, count):
            found["attention.q_lora_rank"] = 0
        if not source.get("expert_gating_func"):
            sigmoid = count in (47, 48) and _tokens(source) == 154880
            found["expert_gating_func"] = 2 if sigmoid else 1
    return {f"deepseek2.{rest}": Field(GGUFValueType.UINT32, x) for rest, x in found.items()}


def _recurrent(layers: FileLayers, number: int) -> bool:
    default = _FULL_ATTENTION[layers.source.architecture]
    return (number + 1) % int(layers.source.get("full_attention_interval") or default) != 0


def _narrowed(layers: FileLayers, one: Kept, numbers: Mapping[int, int]) -> Kept:
    """A tensor outside the layers, which may have columns or rows for each of them."""
    source, width = layers.source, int(layers.source.get("embedding_length_per_layer_input") or 0)
    if not one.source.startswith(("per_layer_token_embd", "per_layer_model_proj")):
        return one
    tensor, size = source.tensors[one.source], width * layers.count
    if one.source.startswith("per_layer_model_proj") and tensor.shape[0] == size:
        rows = tuple(row for old in numbers for row in range(old * width, (old + 1) * width))
        return replace(one, rows=rows)
    weights, _ = BLOCKS[tensor.type]
    if tensor.shape[1] != size or width % weights:
        raise _refused(f"its shape {tensor.shape} cannot be divided by layer", one.source)
    tokens = range(tensor.shape[0]) if one.rows is None else one.rows

    def columns() -> Iterator[np.ndarray]:
        for first in range(0, len(tokens), 1024):
            found = tensor.read(tokens[first : first + 1024])
            yield found.reshape(len(found), layers.count, -1)[:, list(numbers)].copy()

    return Kept(one.source, replaced=columns, shape=(len(tokens), width * len(numbers)))


Get = Callable[[str], Any]
"""The value of a key of the architecture."""


def _check_roles(layers: FileLayers, kept: Sequence[int], changed: Mapping[str, Field]) -> None:
    """Refuse a cut after which llama.cpp derives something else from a number."""
    source = layers.source

    def after(name: str) -> Any:
        field = changed.get(f"{source.architecture}.{name}")
        return source.get(name) if field is None else field.value

    was = _constants(layers, layers.count, source.get)
    becomes = _constants(layers, len(kept), after)
    for name, value in was.items():
        if becomes[name] != value:
            raise _impossible(
                layers,
                f"llama.cpp takes the {name} of this architecture from the number of layers: "
                f"{value} of {layers.count}, {becomes[name]} of {len(kept)}",
                "leave the layers of this file as they are",
            )
    for new, old in enumerate(kept):
        before = _role(layers, old, layers.count, source.get)
        behind = _role(layers, new, len(kept), after)
        for name, value in before.items():
            if behind[name] != value:
                raise _impossible(
                    layers,
                    f"layer {old} would become layer {new}, and llama.cpp takes the {name} of a "
                    "layer from its number",
                    "remove whole periods of neighbouring layers, or later ones",
                )


def _check_kinds(layers: FileLayers, kept: Sequence[int]) -> None:
    """Refuse to remove all layers of a kind: llama.cpp prepares for it, and cannot run then."""
    found = (IN_LAYER.fullmatch(name) for name in layers.source.tensors)
    own = [(int(match[1]), match[2]) for match in found if match]
    kinds = {
        "recurrence": {number for number, rest in own if _RECURRENT.match(rest)},
        "attention": {number for number, rest in own if rest.startswith("attn_output.")},
    }
    if layers.source.architecture == "llama4":
        kinds["attention over all positions"] = {*range(3, layers.count, 4)}
    for kind, numbers in kinds.items():
        numbers &= {*range(layers.count)}
        if numbers and not numbers & {*kept}:
            raise _impossible(
                layers,
                f"no layer with {kind} would stay, and llama.cpp cannot run the file then",
                f"keep one of the layers {sorted(numbers)[:8]}",
            )


def _role(layers: FileLayers, number: int, count: int, get: Get) -> dict[str, Any]:
    """What llama.cpp derives from the number of a layer."""
    arch, role = layers.source.architecture, dict[str, Any]()
    window, pattern = get("attention.sliding_window"), get("attention.sliding_window_pattern")
    slides = window or (window is None and arch in ("llama4", "gemma2"))
    if arch in _PERIODS and slides:
        period, place = _PERIODS[arch]
        if not isinstance(pattern, np.ndarray | list):
            period = period if pattern is None else int(pattern)
        elif arch in _READ_ARRAYS:
            period = 0
        place = place and period - 1
        role["window"] = period > 1 and number % period == place
    if arch in _WITHOUT_ROTATION and (slides or arch in ("afmoe", "smollm3")):
        role["rotary positions"] = number % 4 == _WITHOUT_ROTATION[arch]
    elif arch == "llama4":
        role["rotary positions"] = number + 1 == count
    if step := get("interleave_moe_layer_step"):
        leading = int(get("leading_dense_block_count") or 0)
        role["experts"] = number >= leading and (number + 1) % step == 0
    if step := get("moe_every_n_layers"):
        role["experts"] = number % step == 1
    if step := get("rescale_every_n_layers"):
        role["scale"] = number // step
    if step := get("attn_res.block_size"):
        role["residual blocks"] = number % step
    if first := get("n_deepstack_layers"):
        role["first layers' images"] = min(number, int(first))
    for first in _FIRST.get(arch, ()):
        role[f"first {first} layers' kind"] = number < first
    return role


def _constants(layers: FileLayers, count: int, get: Get) -> dict[str, Any]:
    """What llama.cpp derives from the number of all layers."""
    arch = layers.source.architecture
    if arch == "baichuan":
        return {"positions": {32: "rotary", 40: "linear"}.get(count, "none")}
    if arch == "exaone4":
        return {"window": count == 64}
    if arch == "deepseek2":
        return {
            "rank of queries": 0 if _lite(layers.source, count) else get("attention.q_lora_rank")
        }
    if arch in ("gemma2", "gemma3"):
        heads = np.atleast_1d(get("attention.head_count"))[:1].tolist()
        head = (get("embedding_length") or 0) // (heads[0] or 1 if heads else 1)
        own = (arch, count) in (("gemma2", 46), ("gemma3", 62))
        return {"scale of queries": head if own else get("attention.key_length") or head}
    return {}


def _lite(source: GGUFSource, count: int) -> bool:
    """Whether llama.cpp takes a file for one of DeepSeek-V2-Lite's kind."""
    return count in (26, 27) or (count == 48 and _tokens(source) == 128256)


def _tokens(source: GGUFSource) -> int:
    """The size of the vocabulary."""
    field = source.fields.get("tokenizer.ggml.tokens")
    return int(source.get("vocab_size") or (0 if field is None else len(field.value)))


def _needed(layers: FileLayers, kept: Iterable[int]) -> dict[int, str]:
    """Layers whose result others read, and why."""
    source, stay = layers.source, set(kept)
    needed = {}
    if shared := source.get("attention.shared_kv_layers"):
        first = layers.count - int(shared)
        if stay & set(range(first, layers.count)):
            needed = dict.fromkeys((first - 2, first - 1), "later layers read its keys and values")
    if source.architecture == "glm-dsa":
        full = 0
        for number, own in enumerate(np.atleast_1d(source.get("attention.indexer.types", 1))):
            full = number if own else full
            if number in stay and number != full:
                needed[full] = f"layer {number} takes its index"
    mapping = np.atleast_1d(source.get("deepstack_mapping", -1))
    images = (number for number, place in enumerate(mapping) if place >= 0)
    return needed | dict.fromkeys(images, "images enter there")


def _impossible(layers: FileLayers, what: str, remedy: str) -> RecipeError:
    return RecipeError(what, where=layers.source.architecture, remedy=remedy)
