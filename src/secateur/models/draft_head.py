"""A draft head: one decoder layer that reads its parent's hidden states and proposes tokens.

The form is that of EAGLE-3 (Li et al., EAGLE-3: Scaling up Inference Acceleration of Large Language
Models via Training-Time Test, 2025, arXiv 2503.01840). For position t, s are the parent's residual
streams after `layers` decoder layers each (three numbers), and x is the token of position t + 1:

    h  = fc([s_low; s_middle; s_high])                 where the parent has computed position t
    h  = the head's own h2 of the position before      further on in a chain
    a  = attention over [input_layernorm(embed(x)); hidden_norm(h)], with the keys before
    h1 = h + o(a)
    h2 = h1 + mlp(post_attention_layernorm(h1))
    logits of token t + 2 = lm_head(norm(h2)), for the tokens `ids` only

The layer is one of Llama, whatever the parent's family: RMS norms, a gated feed-forward with SiLU,
rotary positions over the whole of a head. That is what vLLM and llama.cpp compute for such a head.
Sizes and the base of the rotation are the parent's, and so are the embeddings, which are no part of
the head.

A folder of a head has the form that vLLM and the library speculators read: `config.json` with
`speculators_model_type`, and `model.safetensors`. There `d2t` [drafted] is what is added to a
place in `lm_head` to get its token, and `t2d` [vocabulary] says which tokens have a place.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from secateur.models import checkpoint
from secateur.models.architecture import text_config
from secateur.models.configuration import HEAD, read_configuration
from secateur.models.skeleton import empty_cache
from secateur.runs.output import write_bytes, write_json

KIND, WEIGHTS = "speculators_model_type", "model.safetensors"

FAULTS = (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError)
"""What a damaged folder may raise."""

VALUES = "secateur_values"
"""Our own key of a head's `config.json`: `DraftHead.values`."""

COLUMNS = 64
"""The feed-forward has a multiple of so many columns."""

REFUSED = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
"""Options of EAGLE-3 in speculators that change the formula."""


def head_config(parent: Any) -> Any:
    """The configuration of the head's layer, by that of the parent.

    The feed-forward has 8 / 3 · hidden columns, as in Llama: a parent may have experts.
    """
    from transformers import LlamaConfig

    own = text_config(parent)
    rotary = getattr(own, "rope_parameters", None) or {}
    # families with two kinds of layers have two bases; those of full attention reach further
    rotary = rotary.get("full_attention", rotary)
    heads = own.num_attention_heads
    return LlamaConfig(
        vocab_size=own.vocab_size,
        hidden_size=own.hidden_size,
        intermediate_size=-(-8 * own.hidden_size // (3 * COLUMNS)) * COLUMNS,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=getattr(own, "num_key_value_heads", None) or heads,
        head_dim=getattr(own, "head_dim", None) or own.hidden_size // heads,
        max_position_embeddings=own.max_position_embeddings,
        rms_norm_eps=getattr(own, "rms_norm_eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": rotary.get("rope_theta", 1e4)},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def tapped_layers(count: int) -> tuple[int, int, int]:
    """After how many of the parent's decoder layers its states are read, as EAGLE-3 chooses them.

    Example:
        >>> from secateur.models.draft_head import tapped_layers
        >>> tapped_layers(30), tapped_layers(4)
        ((2, 15, 27), (1, 2, 3))
    """
    low, middle, high = 2, count // 2, count - 3
    if low < middle < high:
        return low, middle, high
    return max(0, count // 2 - 1), count // 2, min(count, count // 2 + 1)


class DraftHead(nn.Module):
    """A head that proposes tokens; its weights are random until they are loaded or learned.

    Args:
        config: of its layer (`head_config`).
        taps: after how many of the parent's decoder layers the states are read, ascending.
        ids: the tokens that it proposes, ascending.

    Attributes:
        config, taps, ids: as given.
        layers: the one decoder layer; its q, k and v have 2 · hidden columns.
        values: how our loop stores its matrices: bfloat16, int8 or int4.
    """

    ids: Tensor
    values = "int8"

    def __init__(self, config: Any, taps: Sequence[int], ids: Int64[Tensor, " drafted"]) -> None:
        from transformers.models.llama import modeling_llama as llama

        super().__init__()
        self.config, self.taps = config, tuple(taps)
        self.register_buffer("ids", ids, persistent=False)
        hidden, head = config.hidden_size, config.head_dim
        self.fc = nn.Linear(3 * hidden, hidden, bias=False)
        config._attn_implementation = "sdpa"
        layer: Any = llama.LlamaDecoderLayer(config, 0)
        layer.hidden_norm = llama.LlamaRMSNorm(hidden, config.rms_norm_eps)
        queries, groups = config.num_attention_heads, config.num_key_value_heads
        for name, heads in (("q_proj", queries), ("k_proj", groups), ("v_proj", groups)):
            setattr(layer.self_attn, name, nn.Linear(2 * hidden, heads * head, bias=False))
        self.layers = nn.ModuleList([layer])
        self.norm = llama.LlamaRMSNorm(hidden, config.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, len(ids), bias=False)
        self.rotary = llama.LlamaRotaryEmbedding(config)

    def proposing(self, ids: Int64[Tensor, " fewer"] | None) -> DraftHead:
        """The same head for some of its tokens only, ascending; for all with None."""
        ids, head = self.ids if ids is None else ids, copy.copy(self)
        head._modules = dict(self._modules)
        head._buffers = {**self._buffers, "ids": ids}
        head.lm_head = nn.Linear(self.config.hidden_size, len(ids), bias=False, device="meta")
        head.lm_head.weight = nn.Parameter(self.lm_head.weight[torch.isin(self.ids, ids)])
        return head

    def forward(self, *given: Any) -> list[Float[Tensor, "batch tokens drafted"]]:
        """The logits of every place in chains, by what `chain` is given."""
        return [self.lm_head(read) for read in self.chain(*given)]

    def chain(
        self,
        states: Float[Tensor, "batch tokens three_hidden"],
        embedded: Float[Tensor, "batch tokens_and_more hidden"],
        steps: int = 1,
    ) -> list[Float[Tensor, "batch tokens hidden"]]:
        """What `lm_head` reads at every place in chains that begin after each position.

        Args:
            states: of the parent at positions t = 0, 1, …, the three side by side.
            embedded: the parent's embeddings of the tokens of positions 1, 2, …: `steps` − 1 more
                than there are states.
            steps: places of a chain.

        Returns:
            For each place i, what gives the logits of token t + 2 + i, given tokens up to t + 1 + i
            and states up to t.
        """
        layer: Any = self.layers[0]
        hidden, tokens, found = self.fc(states.float()), states.shape[1], []
        cache = empty_cache(layer.self_attn)
        for place in range(steps):
            read = layer.input_layernorm(embedded[:, place : place + tokens].float())
            at = torch.arange(place, place + tokens, device=read.device)[None]
            mixed, _ = layer.self_attn(
                torch.cat([read, layer.hidden_norm(hidden)], -1),
                position_embeddings=self.rotary(hidden, at),
                attention_mask=chain_mask(tokens, place, hidden),
                **cache,
            )
            hidden = hidden + mixed
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            found.append(self.norm(hidden))
        return found

    def logits(self, read: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocabulary"]:
        """Of all tokens of the parent, by what `lm_head` reads: −∞ for those it never proposes."""
        every = torch.full((len(read), self.config.vocab_size), -torch.inf)
        every[:, self.ids] = self.lm_head(read).float()
        return every


def chain_mask(tokens: int, place: int, like: Tensor) -> Float[Tensor, "1 1 tokens keys"]:
    """What attention adds to its scores at a place of chains, 0 or the least number.

    A chain that begins after position t sees the first keys up to t, and then its own.

    Args:
        tokens: positions after which chains begin.
        place: from 0; each has so many keys.
        like: of the dtype and the device.
    """
    own = torch.eye(tokens, dtype=torch.bool, device=like.device)
    seen = torch.cat([torch.ones_like(own).tril(), *[own] * place], 1)
    return like.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(like.dtype).min)[None, None]


def write_head(
    folder: Path, head: DraftHead, parent: str, architecture: str, proposed: int
) -> None:
    """Write a head as vLLM and speculators read it, in bfloat16.

    Args:
        folder: an existing one.
        head: what is written.
        parent: name or folder of its parent.
        architecture: of the parent, as in its `config.json`.
        proposed: tokens of a chain, where the reader chooses none.
    """
    layer = head.config.to_diff_dict()
    layer |= {"model_type": "llama", "rope_theta": layer["rope_parameters"]["rope_theta"]}
    method = {"proposal_type": "greedy", "speculative_tokens": proposed}
    config = {
        "architectures": ["Eagle3Speculator"],
        KIND: "eagle3",
        "speculators_version": "0.9.0",
        "model_type": HEAD,
        "draft_vocab_size": len(head.ids),
        "eagle_aux_hidden_state_layer_ids": [*head.taps],
        **dict.fromkeys(REFUSED, False),
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": parent, "architectures": [architecture]},
        },
        "dtype": "bfloat16",
        VALUES: head.values,
    }
    chosen = torch.zeros(head.config.vocab_size, dtype=torch.bool)
    chosen[head.ids] = True
    tensors = {n: x.detach().bfloat16().contiguous() for n, x in head.state_dict().items()}
    tensors |= {"d2t": head.ids - torch.arange(len(head.ids)), "t2d": chosen}
    write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_json(folder / "config.json", config)


def read_head(folder: Path) -> DraftHead:
    """Read a head, in the dtype of its file.

    Raises:
        CheckpointError: the folder has no head, a damaged one, or one of another formula.
    """
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = read_configuration(folder)
    try:
        own, odd = config["transformer_layer_config"], [x for x in REFUSED if config.get(x)]
        form = [config[KIND], own["model_type"], own["num_hidden_layers"], *odd]
        if form != ["eagle3", "llama", 1]:
            raise ValueError(f"it computes another formula than EAGLE-3's: {form}")
        layer = LlamaConfig(**own)
        tensors = load_file(folder / WEIGHTS)
        tensors.pop("t2d", None)
        ids = torch.arange(config["draft_vocab_size"])
        ids = ids + tensors.pop("d2t", torch.zeros_like(ids))
        tensors.pop("embed_tokens.weight", None)
        if not bool(((ids >= 0) & (ids < layer.vocab_size)).all()):
            raise ValueError("d2t leads out of the vocabulary")
        with torch.device("meta"):
            head = DraftHead(layer, config["eagle_aux_hidden_state_layer_ids"], ids)
        head.load_state_dict(tensors, assign=True)
        head.ids, head.rotary = ids, LlamaRotaryEmbedding(layer)
        if any(not x.is_floating_point() for x in head.parameters()):
            raise ValueError("a weight is no floating-point number")
    except FAULTS as error:
        raise checkpoint.damaged(f"the head cannot be read: {error}", folder) from None
    head.values = str(config.get(VALUES, head.values))
    return head.eval()
