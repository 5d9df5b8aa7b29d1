"""The configuration of a model whose layers differ in size, for vLLM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig

from secateur.errors import ArchitectureError
from secateur.models.varied import MODEL_TYPE

ARCHITECTURE = "SecateurVariedForCausalLM"
"""What models with layers of different sizes are called in vLLM."""

BASES = ("llama", "mistral")
"""The base classes whose layers vLLM computes like transformers where they differ in size."""

RESIZED = r"model\.layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"


class VariedSizes(LlamaConfig):
    """The `config.json` of a varied model, where vLLM runs. vLLM reads `block_configs`."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration.

        Raises:
            ArchitectureError: vLLM has no class for such layers.
        """
        _refuse_others(config_dict)
        own = {**config_dict, "architectures": [ARCHITECTURE]}
        own.pop("auto_map", None)  # or vLLM would ask to trust the code of the folder
        return super().from_dict(own, **kwargs)

    @property
    def block_configs(self) -> list[SimpleNamespace]:
        """The sizes of every layer, under the names that vLLM reads."""
        cut: Mapping[str, Any] = self.secateur_cut
        absent, shapes = cut.get("absent", {}), cut.get("shapes", {})

        def rows(name: str, otherwise: int) -> int:
            shape = shapes.get(name)
            return otherwise if shape is None else int(shape[0])

        head = int(self.head_dim or 0)
        usual = (("q", self.num_attention_heads), ("k", self.num_key_value_heads or 0))
        found = []
        for index in range(self.num_hidden_layers):
            layer = f"model.layers.{index}"
            heads, kv_heads = (
                rows(f"{layer}.self_attn.{part}_proj", count * head) // head
                for part, count in usual
            )
            ffn = rows(f"{layer}.mlp.gate_proj", self.intermediate_size)
            heads = 0 if f"{layer}.self_attn" in absent else heads
            ffn = 0 if f"{layer}.mlp" in absent else ffn
            # the names of Nemotron's `block_configs`, which vLLM's class reads
            attention = SimpleNamespace(
                no_op=heads == 0,
                heads=heads,
                kv_heads=kv_heads,
                n_heads_in_group=heads // max(kv_heads, 1),
            )
            sizes = SimpleNamespace(no_op=ffn == 0, intermediate_size=ffn)
            found.append(SimpleNamespace(attention=attention, ffn=sizes))
        return found


def _refuse_others(config: Mapping[str, Any]) -> None:
    """Refuse what the class of vLLM would compute differently."""
    base, cut = config.get("base_model_type"), config.get("secateur_cut", {})
    resized = [n for n in cut.get("shapes", {}) if not re.fullmatch(RESIZED, n)]
    why = None
    if base not in BASES:
        why = f"vLLM has no class for layers of different sizes of a {base} model"
    elif config.get("sliding_window"):
        why = "vLLM's class for layers of different sizes has no sliding window"
    elif resized:
        why = f"vLLM cannot resize {resized[0]}"
    if why is not None:
        raise ArchitectureError(
            why,
            where="config.json",
            remedy=f"cut all layers alike (--allocation uniform); of {', '.join(BASES)} models, "
            "heads, neurons and sub-blocks may differ",
        )
