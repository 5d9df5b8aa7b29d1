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
`qwen35.cpp` and `glm4-moe.cpp`). One layer is applied again and again. Of several layers each has
its own place in a chain, and reads the places before it anew, as llama.cpp's `draft-mtp` does.

Deviation: vLLM multiplies the embedding at position 0 by 0. Neither SGLang nor llama.cpp does, and
it changes one key.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.errors import ArchitectureError
from secateur.models import skeleton
from secateur.models.architecture import describe, text_config
from secateur.models.checkpoint import CheckpointReader
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


class MTPLayer(nn.Module):
    """One layer.

    Args:
        core: the family's decoder with one decoder layer, and without embedding and last norm.
        norm: a norm of the family.
        hidden_first: whether `eh_proj` reads the hidden state before the embedding.
        carries_norm: whether a chain goes on with what the norm returns.
    """

    def __init__(self, core: Any, norm: nn.Module, *, hidden_first: bool, carries_norm: bool):
        super().__init__()
        hidden, dtype = core.config.hidden_size, next(norm.parameters()).dtype
        self.core, self.hidden_first, self.carries_norm = core, hidden_first, carries_norm
        self.enorm, self.hnorm, self.norm = (copy.deepcopy(norm) for _ in range(3))
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False, dtype=dtype, device="meta")

    def forward(
        self,
        states: Float[Tensor, "batch tokens hidden"],
        embedded: Float[Tensor, "batch tokens hidden"],
        positions: Int64[Tensor, "batch tokens"],
        cache: Mapping[str, Any],
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the head reads, and what the next place of a chain does, [batch, tokens, hidden].

        Args:
            states: the parent's, or what the place before has returned.
            embedded: of the tokens that follow.
            positions: of the states.
            cache: of this layer; it receives the keys.
            mask: 0 or −∞ for each key, [1, 1, tokens, keys]; None: no later keys.
        """
        both = [self.enorm(embedded), self.hnorm(states)]
        x = self.eh_proj(torch.cat(both[::-1] if self.hidden_first else both, -1))
        given = {"attention_mask": mask, "position_ids": positions, "use_cache": True, **cache}
        y = self.core(inputs_embeds=x, **given).last_hidden_state
        z = self.norm(y)
        return z, z if self.carries_norm else y


class MTP(nn.Module):
    """All layers, with embedding and head.

    Args:
        layers: in the order of their places in a chain.
        embed, head: of the layers, or of the parent.
    """

    def __init__(self, layers: Sequence[MTPLayer], embed: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.layers, self.embed, self.head = nn.ModuleList(layers), embed, head

    def chain(
        self,
        states: Float[Tensor, "batch tokens hidden"],
        ids: Int64[Tensor, "batch tokens_and_more"],
        steps: int = 1,
    ) -> list[Float[Tensor, "batch tokens hidden"]]:
        """What the head reads at every place in chains that begin after each position.

        Args:
            states: of the parent at positions t = 0, 1, ….
            ids: the tokens of positions 1, 2, …: `steps` − 1 more than there are states.
            steps: places of a chain.

        Returns:
            For each place i, what gives the logits of token t + 2 + i, given tokens up to t + 1 + i
            and states up to t.
        """
        tokens, found, read = states.shape[1], [], [states]
        embedded, caches = (
            self.embed(ids),
            [skeleton.empty_cache(layer.core) for layer in self.layers],
        )
        # a chain that begins after position t sees the first keys up to t, and then its own
        own = torch.eye(tokens, dtype=torch.bool, device=states.device)
        seen = torch.cat([own.cumsum(1).t().bool(), *[own] * (steps - 1)], 1)
        for place in range(steps):
            number = place % len(self.layers)
            # one layer has the keys of the places before; another one computes them anew
            first = place if len(self.layers) == 1 else 0
            blocks = range(first, place + 1)
            keys = tokens * (place + 1)
            rows = [seen[:, :keys] & (torch.arange(keys) < tokens * (b + 1)) for b in blocks]
            mask = torch.zeros(1, 1, tokens * len(rows), keys, dtype=states.dtype)
            mask.masked_fill_(~torch.cat(rows), torch.finfo(states.dtype).min)
            z, carried = self.layers[number](
                torch.cat(read[first:], 1),
                torch.cat([embedded[:, b : b + tokens] for b in blocks], 1),
                torch.cat([torch.arange(b, b + tokens) for b in blocks])[None].expand(len(ids), -1),
                caches[number],
                mask,
            )
            found.append(z[:, -tokens:])
            read.append(carried[:, -tokens:])
        return found

    def forward(
        self,
        states: Float[Tensor, "batch tokens hidden"],
        ids: Int64[Tensor, "batch tokens_and_more"],
        steps: int = 1,
    ) -> list[Float[Tensor, "batch tokens vocabulary"]]:
        """The logits of every place, as `chain`."""
        return [self.head(z) for z in self.chain(states, ids, steps)]


def head_of(weight: Float[Tensor, "tokens hidden"]) -> nn.Linear:
    """A head with these rows."""
    head = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    head.weight = nn.Parameter(weight, requires_grad=False)
    return head


def read_mtp(parent: Any, reader: CheckpointReader, dtype: torch.dtype | None = None) -> MTP:
    """Read the layers of a checkpoint.

    Args:
        parent: the same model, loaded: it gives embedding and head where a layer has none.
        reader: of its folder; shows dense tensors.
        dtype: of the computation; None for that of the checkpoint.

    Raises:
        ArchitectureError: there are no such layers, or they have another form.
    """
    parts = stored_layers(reader, dtype)
    embed, head = parts[0].module("embed"), parts[0].module("head")
    found = MTP(
        [one.layer() for one in parts],
        embed or parent.get_input_embeddings(),
        head or parent.get_output_embeddings(),
    )
    return found.eval().requires_grad_(False)


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

    def role(self, role: str) -> str | None:
        """The name within the layer of what plays a role; None where nothing does."""
        return next((x for x in ROLES[role] if f"{x}.weight" in self.stored), None)

    def weight(self, role: str) -> Tensor:
        """A weight besides those of the decoder layer."""
        name = self.role(role)
        if name is None:
            raise self.unknown(f"it has no {' or '.join(ROLES[role])}")
        return self.reader.read(self.stored[f"{name}.weight"]).to(self.model.dtype)

    def module(self, role: str) -> nn.Module | None:
        """The layer's own embedding or head; None where it has the parent's."""
        if self.role(role) is None:
            return None
        weight = self.weight(role)
        if role == "embed":
            return nn.Embedding.from_pretrained(weight)
        return head_of(weight)

    def unknown(self, why: str) -> ArchitectureError:
        """The error for a layer of another form."""
        return ArchitectureError(
            f"a layer that predicts further tokens cannot be computed here: {why}",
            where=f"{min(self.stored.values())} in {self.reader.folder}",
            remedy="the engines that know this family use it: vLLM, SGLang, llama.cpp",
        )

    def layer(self) -> MTPLayer:
        """The layer, with its weights."""
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
        hidden_first = self.role("eh_proj") == "input_proj"
        raw = core.config.model_type.startswith("deepseek")
        made = MTPLayer(core, norm, hidden_first=hidden_first, carries_norm=not raw)
        for role in ("enorm", "hnorm", "norm", "eh_proj"):
            made.get_submodule(role).weight = nn.Parameter(self.weight(role), requires_grad=False)
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
