"""Multi-token prediction (MTP): the layers of a checkpoint that propose the tokens after the next.

h_t is the parent's last hidden state, after its last norm, and x_{t+1} the token that follows:

    x = eh_proj([enorm(embed(x_{t+1})); hnorm(h_t)])     MiMo has hnorm's part first
    y = one decoder layer of the family over x, at position t, with the keys before
    z = norm(y)
    logits of token t + 2 = head(z), and what comes after z in a chain is the next h

(DeepSeek-V3 Technical Report, 2024, arXiv 2412.19437, section 2.2.) The tensors have these names:

    enorm    hnorm    eh_proj    shared_head.norm    GLM-4.5 and later, DeepSeek V3, MiniMax-M2
    pre_fc_norm_embedding    pre_fc_norm_hidden    fc    norm         Qwen3-Next, Qwen3.5
    token_layernorm    hidden_layernorm    input_proj    final_layernorm    MiMo

Embedding and head are the parent's where the layer has none of its own. Checkpoints differ in what
a chain carries: z for GLM, Qwen and MiMo, and y for DeepSeek (vLLM's `deepseek_mtp.py`,
`glm4_moe_mtp.py`, `qwen3_5_mtp.py` and `mimo_mtp.py`, with pull request 46075; llama.cpp's
`qwen35.cpp` and `glm4-moe.cpp`). Of several layers the first one proposes, again and again.

Deviation: vLLM multiplies the embedding at position 0 by 0. Neither SGLang nor llama.cpp does, and
it changes one key.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.errors import ArchitectureError
from secateur.models import skeleton
from secateur.models.architecture import describe, text_config
from secateur.models.checkpoint import CheckpointReader
from secateur.models.draft_head import chain_mask
from secateur.models.inventory import FurtherLayers

ROLES: Mapping[str, tuple[str, ...]] = {
    "enorm": ("enorm", "pre_fc_norm_embedding", "token_layernorm"),
    "hnorm": ("hnorm", "pre_fc_norm_hidden", "hidden_layernorm"),
    "eh_proj": ("eh_proj", "fc", "input_proj"),
    "norm": ("shared_head.norm", "norm", "final_layernorm"),
    "embed": ("embed_tokens",),
    "head": ("shared_head.head",),
}
"""What a layer has besides a decoder layer, and how checkpoints call it."""


class MTP(nn.Module):
    """A layer, with embedding and head. A chain applies it again and again.

    Args:
        core: the family's decoder with one decoder layer, and without embedding and last norm.
        norm: a norm of the family.
        embed, head: of the layer, or of the parent.
        hidden_first: whether `eh_proj` reads the hidden state before the embedding.

    Attributes:
        carries_norm: whether a chain goes on with what the norm returns.
    """

    def __init__(self, core: Any, norm: Any, embed: Any, head: Any, hidden_first: bool) -> None:
        super().__init__()
        hidden, dtype = core.config.hidden_size, next(norm.parameters()).dtype
        self.core, self.embed, self.head, self.hidden_first = core, embed, head, hidden_first
        self.carries_norm = not core.config.model_type.startswith("deepseek")
        self.enorm, self.hnorm, self.norm = (copy.deepcopy(norm) for _ in range(3))
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False, dtype=dtype, device="meta")

    def step(
        self,
        states: Float[Tensor, "batch tokens hidden"],
        embedded: Float[Tensor, "batch tokens hidden"],
        first: int,
        cache: Mapping[str, Any],
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the head reads, and what the next place of a chain does, [batch, tokens, hidden].

        Args:
            states: the parent's, or what the place before has returned.
            embedded: of the tokens that follow.
            first: the position of the first state.
            cache: of this layer; it receives the keys.
            mask: 0 or −∞ for each key, [1, 1, tokens, keys]; None: no later keys.
        """
        both = [self.enorm(embedded), self.hnorm(states)]
        x = self.eh_proj(torch.cat(both[::-1] if self.hidden_first else both, -1))
        at = torch.arange(first, first + x.shape[1], device=x.device).expand(len(x), -1)
        given = {"attention_mask": mask, "position_ids": at, "use_cache": True, **cache}
        y = self.core(inputs_embeds=x, **given).last_hidden_state
        z = self.norm(y)
        return z, z if self.carries_norm else y

    def chain(
        self,
        states: Float[Tensor, "batch tokens hidden"],
        embedded: Float[Tensor, "batch tokens_and_more hidden"],
        steps: int = 1,
    ) -> list[Float[Tensor, "batch tokens hidden"]]:
        """What the head reads at every place in chains: see `DraftHead.chain`."""
        tokens, found, cache = states.shape[1], [], skeleton.empty_cache(self.core)
        for place in range(steps):
            mask = chain_mask(tokens, place, states)
            z, states = self.step(states, embedded[:, place : place + tokens], place, cache, mask)
            found.append(z)
        return found

    def forward(self, *given: Any) -> list[Float[Tensor, "batch tokens vocabulary"]]:
        """The logits of every place, by what `chain` is given."""
        return [self.logits(z) for z in self.chain(*given)]

    def logits(self, read: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocabulary"]:
        """By what the head reads."""
        found: Tensor = self.head(read)
        return found


def head_of(weight: Float[Tensor, "tokens hidden"]) -> nn.Linear:
    """A head with these rows."""
    head = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    head.weight = nn.Parameter(weight, requires_grad=False)
    return head


def read_mtp(parent: Any, reader: CheckpointReader, dtype: torch.dtype | None = None) -> MTP:
    """Read the first layer of a checkpoint.

    Args:
        parent: the same model, loaded: it gives embedding and head where the layer has none.
        reader: of its folder; shows dense tensors.
        dtype: of the computation; None for that of the checkpoint.

    Raises:
        ArchitectureError: there are no such layers, or they have another form.
    """
    return stored_layers(reader, dtype)[0].read(parent).eval().requires_grad_(False)


def stored_layers(reader: CheckpointReader, dtype: torch.dtype | None = None) -> list[StoredLayer]:
    """The layers of a checkpoint, not read yet; arguments and errors as of `read_mtp`."""
    model = skeleton.build_skeleton(reader.folder, dtype=dtype)
    architecture = describe(model)
    names, further = skeleton.model_names(model, reader), FurtherLayers.of(model, architecture)
    shared: dict[str, str] = {}
    own: dict[int, dict[str, str]] = {}
    for stored, name in names.items():
        place = further.place(name)
        if place is not None:
            own.setdefault(place.layer, {})[place.inner] = stored
        elif further.holds(name):
            shared[re.split(r"(?:^|\.)mtp\w*\.", name, maxsplit=1)[-1]] = stored
    if not own:
        raise ArchitectureError(
            "this checkpoint has no layers that predict further tokens (MTP)",
            where=str(reader.folder),
            remedy="train a head of its own: secateur draft MODEL --head",
        )
    path = architecture.layers_path
    return [StoredLayer(model, path, reader, shared | own[n]) for n in sorted(own)]


@dataclass(frozen=True)
class StoredLayer:
    """The tensors of one layer.

    Attributes:
        model: a skeleton.
        path: of its decoder layers.
        reader: of the checkpoint.
        stored: their names in the checkpoint, by those within the layer.
    """

    model: Any
    path: str
    reader: CheckpointReader
    stored: Mapping[str, str]

    def weight(self, role: str) -> Tensor | None:
        """A weight besides those of the decoder layer; None where nothing plays the role."""
        stored = [self.stored[n] for x in ROLES[role] if (n := f"{x}.weight") in self.stored]
        return self.reader.read(stored[0]).to(self.model.dtype) if stored else None

    def unknown(self, why: str) -> ArchitectureError:
        """The error for a layer of another form."""
        return ArchitectureError(
            f"a layer that predicts further tokens cannot be computed here: {why}",
            where=f"{min(self.stored.values())} in {self.reader.folder}",
            remedy="the engines that know this family use it: vLLM, SGLang, llama.cpp",
        )

    def read(self, parent: Any) -> MTP:
        """The layer, with its weights, and with embedding and head of the parent if it has none."""
        owner, _, leaf = self.path.rpartition(".")
        core = copy.copy(self.model.get_submodule(owner))
        core._modules = dict(core._modules)
        number = self._like(core.get_submodule(leaf))
        block = copy.deepcopy(core.get_submodule(f"{leaf}.{number}"))
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = 0
        skeleton.fill(block, "", self.reader, {f".{n}": s for n, s in self.stored.items()},
                      torch.device("cpu"), self.model.dtype)  # fmt: skip
        for name, buffer in skeleton.stored_buffers(block).items():
            buffer.copy_(self.reader.read(self.stored[name]))
        core.config = copy.deepcopy(text_config(self.model.config))
        core.config.num_hidden_layers = 1
        if getattr(core.config, "layer_types", None):
            core.config.layer_types = [core.config.layer_types[number]]
        norm = core.norm
        core._modules |= {leaf: nn.ModuleList([block]), "norm": nn.Identity()}
        core._modules.pop("embed_tokens")
        rows, outputs = self.weight("embed"), self.weight("head")
        embed, head = parent.get_input_embeddings(), parent.get_output_embeddings()
        embed = embed if rows is None else nn.Embedding.from_pretrained(rows)
        head = head if outputs is None else head_of(outputs)
        made = MTP(core, norm, embed, head, "input_proj.weight" in self.stored)
        for role in ("enorm", "hnorm", "norm", "eh_proj"):
            weight = self.weight(role)
            if weight is None:
                raise self.unknown(f"it has no {' or '.join(ROLES[role])}")
            made.get_submodule(role).weight = nn.Parameter(weight, requires_grad=False)
        return made

    def _like(self, layers: nn.ModuleList) -> int:
        """The number of the last decoder layer with tensors of the same names and shapes."""
        known = {f"{name}.weight" for names in ROLES.values() for name in names}
        stored = {n: self.reader.entries[s].shape for n, s in self.stored.items() if n not in known}
        for number, layer in reversed([*enumerate(layers)]):
            built = {**dict(layer.named_parameters()), **skeleton.stored_buffers(layer)}
            if {n: tuple(x.shape) for n, x in built.items()} == stored:
                return number
        raise self.unknown("no decoder layer has tensors of the same names and shapes")
