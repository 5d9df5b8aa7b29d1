"""Attention of one layer in float64, token by token, head by head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """What a layer does between W_q, W_k, W_v and W_o; see `sct_decoder` in csrc/secateur.h."""

    heads: int
    groups: int
    head: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    clip: float = 0.0
    interleaved: bool = False
    norm: str = ""  # head, whole or layer
    norm_rotated: bool = False
    epsilon: float = 1e-5
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    cosine: Tensor | None = None
    sine: Tensor | None = None
    sinks: Tensor | None = None

    def normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        if self.norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        shape = x.shape
        x = x.flatten() if self.norm == "whole" else x
        x = x / (x.pow(2).mean(-1, keepdim=True) + self.epsilon).sqrt() * weight.double()
        return x.view(shape)

    def rotated(self, x: Tensor, position: int) -> Tensor:
        if self.cosine is None:
            return x
        x, half = x.clone(), self.cosine.shape[1]
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if self.interleaved else (i, i + half)
            turn = torch.complex(self.cosine[position, i].double(), self.sine[position, i].double())
            pair = torch.complex(x[:, a], x[:, b]) * turn
            x[:, a], x[:, b] = pair.real, pair.imag
        return x

    def finished(self, x: Tensor, bias: Tensor | None, weight: Tensor | None, at: int) -> Tensor:
        """Heads of queries or keys [heads, head]."""
        x = x.double() + (0 if bias is None else bias.double().view_as(x))
        if not self.norm_rotated:
            x = self.normed(x, weight)
        x = self.rotated(x.clamp(-self.clip, self.clip) if self.clip else x, at)
        return self.normed(x, weight) if self.norm_rotated else x

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rounded=lambda x: x) -> Tensor:
        """Of a whole sequence [tokens, heads, head]; `rounded` is what the cache does to a head."""
        values = v.double() + (0 if self.v_bias is None else self.v_bias.double().view_as(v[0]))
        values = rounded(values.clamp(-self.clip, self.clip) if self.clip else values)
        keys = [self.finished(x, self.k_bias, self.k_norm, i) for i, x in enumerate(k)]
        keys = rounded(torch.stack(keys))
        out = torch.empty(q.shape, dtype=torch.float64)
        for at, queries in enumerate(q):
            own = self.finished(queries, self.q_bias, self.q_norm, at) * self.scale
            first = max(0, at + 1 - self.window) if self.window else 0
            for h in range(self.heads):
                group = h // (self.heads // self.groups)
                scores = keys[first : at + 1, group] @ own[h]
                if self.softcap:
                    scores = self.softcap * (scores / self.softcap).tanh()
                if self.sinks is not None:
                    scores = torch.cat([scores, self.sinks[h].double()[None]])
                shares = scores.softmax(0)[: at + 1 - first]
                out[at, h] = shares @ values[first : at + 1, group]
        return out
