"""Tiny checkpoints with a layer that predicts further tokens, and what it computes, in plain torch.

The names are those of published checkpoints, as vLLM reads them (`deepseek_mtp.py`,
`glm4_moe_mtp.py`, `qwen3_next_mtp.py`, `qwen3_5_mtp.py`).
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from at_rest import save_in, stored_tensors
from safetensors.torch import save_file
from tiny import save_tiny, split_shards
from torch import Tensor, nn

from secateur.models.skeleton import quiet_transformers


class Form(NamedTuple):
    """Where a family stores its layer for further tokens.

    Attributes:
        family: in `zoo`.
        like: the decoder layer whose kind it has.
        counted: what the configuration calls the number of such layers.
        apart: it is called `mtp.layers.0`; otherwise it follows the last decoder layer.
        fused: its experts are in two tensors, where those of the decoder layers are one by one.
        offset: what its norms add to their weights.
    """

    family: str
    like: int
    counted: str
    apart: bool = False
    fused: bool = False
    offset: float = 0.0


FORMS = {
    "glm4_moe": Form("glm4_moe", 2, "num_nextn_predict_layers"),
    "deepseek_v3": Form("deepseek_v3", 2, "num_nextn_predict_layers"),
    "minimax_m2": Form("minimax_m2", 2, "num_mtp_modules"),
    "qwen3_next": Form("qwen3_next", 1, "num_nextn_predict_layers", apart=True, offset=1.0),
    "qwen3_5_moe": Form("qwen3_5_moe", 1, "mtp_num_hidden_layers", apart=True, offset=1.0),
    "qwen3_5_moe fused": Form(
        "qwen3_5_moe", 1, "mtp_num_hidden_layers", apart=True, fused=True, offset=1.0
    ),
}


def start_of(form: Form, depth: int = 3) -> str:
    """How the names of the layer's tensors begin, behind so many decoder layers."""
    return "mtp.layers.0." if form.apart else f"model.layers.{depth}."


def own_tensors(form: Form, hidden: int = 32, tokens: int = 96) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the layer has besides a decoder layer, of a model of three."""
    if form.apart:
        norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        return {"mtp.fc.weight": (hidden, 2 * hidden)} | {
            f"mtp.{name}.weight": (hidden,) for name in norms
        }
    start = start_of(form)
    return {
        f"{start}embed_tokens.weight": (tokens, hidden),
        f"{start}enorm.weight": (hidden,),
        f"{start}hnorm.weight": (hidden,),
        f"{start}eh_proj.weight": (hidden, 2 * hidden),
        f"{start}shared_head.norm.weight": (hidden,),
        f"{start}shared_head.head.weight": (tokens, hidden),
    }


def save_further(
    folder: Path, name: str, shards: int = 1, tokens: int = 96, **changes: Any
) -> Path:
    """Write a tiny model of one of `FORMS` with one layer for further tokens."""
    form = FORMS[name]
    save_tiny(folder, form.family, **{form.counted: 1}, **changes)
    tensors = stored_tensors(folder)
    with tempfile.TemporaryDirectory() as place:  # another model gives its decoder layer
        other = stored_tensors(save_tiny(Path(place) / "m", form.family, seed=7, **changes))
    old, new = f"model.layers.{form.like}.", start_of(form)
    made = {new + n.removeprefix(old): x for n, x in other.items() if n.startswith(old)}
    dtype = next(iter(made.values())).dtype
    for own, shape in own_tensors(form, tokens=tokens).items():
        values = torch.randn(shape) * (0.3 if len(shape) > 1 else 0.1)
        made[own] = (values + (len(shape) == 1 and not form.offset)).to(dtype)
    if form.fused:
        made = fused(made)
    save_file(tensors | made, folder / "model.safetensors", metadata={"format": "pt"})
    if shards > 1:
        split_shards(folder, shards)
    return folder


def save_foreseen(folder: Path, name: str, **changes: Any) -> Path:
    """As `save_further`, but a token depends on the one before alone, and the layer knows it."""
    save_further(folder, name, **changes)
    form, tensors = FORMS[name], stored_tensors(folder)
    ends = ("o_proj.weight", "down_proj.weight", "down_proj", "out_proj.weight", ".w2.weight")
    tensors |= {n: torch.zeros_like(x) for n, x in tensors.items() if n.endswith(ends)}
    embedded, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    start = "mtp." if form.apart else start_of(form)
    names = ("pre_fc_norm_embedding", "fc", "norm") if form.apart else NAMES
    hidden = embedded.shape[1]
    tensors |= {
        f"{start}{names[0]}.weight": torch.full((hidden,), 1.0 - form.offset, dtype=head.dtype),
        f"{start}{names[1]}.weight": torch.eye(hidden, 2 * hidden, dtype=head.dtype),
        f"{start}{names[2]}.weight": tensors["model.norm.weight"].clone(),
    }
    if not form.apart:
        own = {"embed_tokens": embedded, "shared_head.head": head}
        tensors |= {f"{start}{n}.weight": x.clone() for n, x in own.items()}
    save_in(folder, tensors, 1)
    return folder


NAMES = ("enorm", "eh_proj", "shared_head.norm")


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with all experts in `gate_up_proj` and `down_proj`."""
    start = "mtp.layers.0.mlp.experts."
    made = {n: x for n, x in tensors.items() if not n.startswith(start)}
    count = len({n.split(".")[5] for n in tensors if n.startswith(start)})

    def of(e: int, linear: str) -> Tensor:
        return tensors[f"{start}{e}.{linear}.weight"]

    both = [torch.cat([of(e, "gate_proj"), of(e, "up_proj")]) for e in range(count)]
    made[f"{start}gate_up_proj"] = torch.stack(both)
    made[f"{start}down_proj"] = torch.stack([of(e, "down_proj") for e in range(count)])
    return made


class Predictor:
    """The layer for further tokens of a folder, computed by transformers' decoder layer.

    Args:
        folder: of one of `FORMS`.
        name: of its form.
        off: experts that its router does not choose.
    """

    def __init__(self, folder: Path, name: str, off: Collection[int] = ()) -> None:
        self.form, self.tensors = FORMS[name], stored_tensors(folder)
        config = json.loads((folder / "config.json").read_text())
        self.depth = config["num_hidden_layers"]
        self.start = start_of(self.form, self.depth)
        # a decoder layer of the same kind receives its tensors
        kinds = config.get("layer_types") or ["full_attention"] * self.depth
        like = max(i for i, kind in enumerate(kinds) if kind == "full_attention")
        self.model = self.loaded(folder, f"model.layers.{like}.")
        self.layer = self.model.get_submodule(f"model.layers.{like}")
        self.eps = config["rms_norm_eps"]
        if off:
            self.switch_off(sorted(off))

    def loaded(self, folder: Path, place: str) -> Any:
        """The model, with this layer in the place of a decoder layer."""
        decoder = {n: x for n, x in self.tensors.items() if not self.owns(n)}
        own = {place + n.removeprefix(self.start): x for n, x in self.tensors.items()
               if n.startswith(self.start)}  # fmt: skip
        if self.form.fused:
            decoder = {n: x for n, x in decoder.items() if not n.startswith(f"{place}mlp.experts")}
        with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
            shutil.copy(folder / "config.json", scratch)
            whole = decoder | {n: x for n, x in own.items() if n in decoder or self.form.fused}
            save_file(whole, Path(scratch) / "model.safetensors", metadata={"format": "pt"})
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                scratch, output_loading_info=True, dtype=torch.float32
            )
        assert not found["missing_keys"]
        assert not found["unexpected_keys"]
        return model.eval()

    def owns(self, name: str) -> bool:
        """Whether a tensor belongs to the layer."""
        return name.startswith(("mtp.", self.start))

    def switch_off(self, off: list[int]) -> None:
        """Keep the router from choosing some experts."""
        mlp: Any = self.layer.mlp
        owner = mlp if hasattr(mlp, "e_score_correction_bias") else mlp.gate
        if hasattr(owner, "e_score_correction_bias"):  # which counts for the choice alone
            owner.e_score_correction_bias[off] = -10.0
            return
        gate = mlp.gate

        def routed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = nn.functional.linear(x.reshape(-1, x.shape[-1]), gate.weight)
            logits[:, off] = -torch.inf
            weights, chosen = logits.softmax(-1).topk(gate.top_k, dim=-1)
            return logits, weights / weights.sum(-1, keepdim=True), chosen

        gate.forward = routed

    def tensor(self, name: str) -> Tensor:
        """One of the tensors besides those of a decoder layer."""
        return self.tensors[("mtp." if self.form.apart else self.start) + f"{name}.weight"].float()

    def norm(self, name: str, x: Tensor) -> Tensor:
        """An RMSNorm of these."""
        scale = self.tensor(name) + self.form.offset
        return scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Logits [windows, length, vocabulary] of the tokens after `tokens`.

        Args:
            hidden: what the last norm of the decoder returned for each position.
            tokens: the token that follows each position.
        """
        return self.head(self.outputs(hidden, tokens))

    @torch.no_grad()
    def head(self, out: Tensor) -> Tensor:
        """Logits, of what `outputs` returns."""
        apart = self.form.apart
        head = self.model.lm_head.weight if apart else self.tensor("shared_head.head")
        return self.norm("norm" if apart else "shared_head.norm", out) @ head.T

    @torch.no_grad()
    def outputs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """What the decoder layer returns, before the norm; arguments as of `logits`."""
        apart, core = self.form.apart, self.model.model
        table = core.embed_tokens.weight if apart else self.tensor("embed_tokens")
        names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden") if apart else ("enorm", "hnorm")
        both = [self.norm(names[0], table[tokens]), self.norm(names[1], hidden)]
        x = torch.cat(both, dim=-1) @ self.tensor("fc" if apart else "eh_proj").T
        positions = torch.arange(tokens.shape[1])[None]
        # three kinds of positions in models that may see
        given = positions[None].expand(3, 1, -1) if apart and "5" in self.form.family else positions
        rotary = core.rotary_emb(x, given)
        out = self.layer(x, position_embeddings=rotary, attention_mask=None, position_ids=positions)
        return out[0] if isinstance(out, tuple) else out

    def chain(self, hidden: Tensor, tokens: Tensor, steps: int) -> list[Tensor]:
        """Logits of the places of one chain, after all of `hidden`, read anew for each place.

        Args:
            hidden: of one window, [1, length, hidden].
            tokens: those after it, and those that the chain reads: `steps` − 1 more.
            steps: how many places.
        """
        found, raw = [], self.form.family.startswith("deepseek")
        for _ in range(steps):
            out = self.outputs(hidden, tokens[:, : hidden.shape[1]])[:, -1:]
            found.append(self.head(out)[0, 0])
            norm = self.norm("norm" if self.form.apart else "shared_head.norm", out)
            hidden = torch.cat([hidden, out if raw else norm], 1)
        return found


def renamed(name: str, form: Form, depth: int) -> str:
    """What a tensor of the layer is called behind so many decoder layers, instead of three."""
    return (
        re.sub(r"^model\.layers\.3\.", f"model.layers.{depth}.", name) if not form.apart else name
    )
