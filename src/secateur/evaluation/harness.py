"""A loaded model with the interface of lm-eval. Imports lm-eval, so import it only to run tasks.

lm-eval (`HFLM`) makes the tokens, splits them into context and continuation, adds the first token
and cuts texts that are too long. This class only computes. It makes logits only for the tokens of a
continuation, always in float32, and requests that read the same tokens share a forward. On a
float32 model the results equal those of `HFLM`. The texts of generative tasks are written by `HFLM`
itself. On a packed model each text has a forward of its
own, as in the server: the last bits depend on the other texts of a forward, and where activations
are rounded to int8, a changed last bit can move an activation by a whole step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn import functional

from secateur.errors import NumericalError
from secateur.evaluation.perplexity import read_by, reader_of
from secateur.runtime.kernels.linear import PackedLinear
from secateur.runtime.load import PackedTarget

log = logging.getLogger(__name__)

TOKENS_PER_FORWARD = 1024

Request = tuple[Any, list[int], list[int]]
Answer = tuple[float, bool]


class HarnessModel(HFLM):
    """A transformers model with its tokenizer; computes log-likelihoods for lm-eval.

    Args:
        model: a causal language model, dense, pruned or packed; or what reads one.
        tokenizer: the model's tokenizer.
        tell: called after each forward with the number of requests answered so far.
    """

    def __init__(self, model: Any, tokenizer: Any, tell: Callable[[int], None]) -> None:
        self.reader, self.tell = reader_of(model), tell
        super().__init__(pretrained=self.reader.module, tokenizer=tokenizer, batch_size=1)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """The log-likelihood of each continuation, and whether greedy decoding produces it."""
        read = [self.tokens_read(request) for request in requests]
        self.warn_of_cuts(requests)
        # the longest first: what does not fit into memory fails at once
        order = sorted(range(len(requests)), key=lambda i: (-len(read[i]), read[i]))
        same = [list(numbers) for _, numbers in groupby(order, key=lambda i: read[i])]
        answers: list[Answer | None] = [None] * len(requests)
        held = (getattr(self.reader, "target", None), *self.reader.module.modules())
        packed = any(isinstance(x, PackedLinear | PackedTarget) for x in held)
        # of each forward, the requests that read the same tokens
        batches, most = list[list[list[int]]](), 1 if packed else TOKENS_PER_FORWARD
        while same:
            count = max(1, most // len(read[same[0][0]]))
            batches.append(same[:count])
            same = same[count:]
        ids = [_padded([read[numbers[0]] for numbers in batch]) for batch in batches]
        with torch.no_grad():
            for batch, ((states, parts),) in zip(batches, read_by([self.reader], ids), strict=True):
                for row, numbers in zip(states, batch, strict=True):
                    row = row[: len(read[numbers[0]])]  # [tokens, width]
                    # requests with the same tokens may have continuations of different lengths
                    longest = max(len(requests[i][2]) for i in numbers)
                    log_p = functional.log_softmax(parts.head(row[-longest:]).float(), dim=-1)
                    for i in numbers:
                        answers[i] = _answer(log_p, requests[i])
                self.tell(sum(map(len, batch)))
        return [found for found in answers if found is not None]

    def written(self, requests: Sequence[Any], disable_tqdm: bool) -> list[str]:
        """The texts with which the model answers, each written by itself."""
        found = list[str]()
        for request in requests:
            found += self.generate_until([request], disable_tqdm=disable_tqdm)
            self.tell(1)
        return found

    def warn_of_cuts(self, requests: list[Request]) -> None:
        """Warn how many requests are longer than the model's context."""
        cut = sum(len(read) + len(asked) > self.max_length + 1 for _, read, asked in requests)
        if cut:
            said = "%d of %d requests are longer than the %d tokens the model reads, and are cut "
            log.warning(said + "from the left", cut, len(requests), self.max_length)

    def tokens_read(self, request: Request) -> tuple[int, ...]:
        """The tokens that the model reads for a request: all but the last, cut from the left."""
        _, context, continuation = request
        return tuple((context + continuation)[-(self.max_length + 1) :][:-1])


def _padded(rows: list[tuple[int, ...]]) -> Tensor:
    """Rows of tokens, padded on the right. A causal model never reads the padding."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def _answer(log_p: Tensor, request: Request) -> Answer:
    """The log-likelihood of a continuation, and whether greedy decoding produces it."""
    tokens = torch.tensor(request[2], device=log_p.device)
    rows = log_p[-len(tokens) :]  # of the continuation; others may have a longer one
    total = float(rows.gather(1, tokens[:, None]).sum())
    if total != total:
        raise NumericalError(
            "the log-likelihood of a continuation is not a number",
            where=repr(request[0])[:200],
            remedy="a weight or activation overflowed: evaluate in float32 or bfloat16, and run "
            "'secateur diagnose' on the model",
        )
    return total, bool((rows.argmax(dim=-1) == tokens).all())
