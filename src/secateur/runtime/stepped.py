"""Models that our own loop does not take, token by token through transformers' `generate`."""

from __future__ import annotations

from typing import Any

import torch
from greenlet import GreenletExit, greenlet
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.errors import ShapeError
from secateur.models.skeleton import quiet_transformers

NEVER = 2**31 - 1
"""More tokens than any text has: who calls decides where it ends."""

PLAIN: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "eos_token_id": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "min_length": 0,
}
"""Options of `generate` under which it neither draws nor ends a text."""


class SteppedGeneration:
    """Decodes one sequence with `generate`, which halts at every token.

    `generate` knows what each family needs between two tokens. It runs in a greenlet. When it has
    computed logits, it hands them over and waits for the token that follows.

    Args:
        model: a transformers causal language model in eval mode, on any device.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.length = 0
        self.running: greenlet | None = None

    def prefill(self, ids: Int64[Tensor, " tokens"]) -> Float[Tensor, " vocabulary"]:
        """Start anew with a prompt; returns the logits after its last token, float32 on the CPU.

        Raises:
            ShapeError: the prompt is empty.
        """
        if len(ids) == 0:
            raise ShapeError("a prompt of 0 tokens")
        self.close()
        self.running = greenlet(self.generate)
        self.length = len(ids)
        return self.resume(ids[None].to(self.model.device))

    def step(self, token: int) -> Float[Tensor, " vocabulary"]:
        """Process one token; returns the logits of the next, float32 on the CPU."""
        if self.running is None:
            raise ShapeError("there is no prompt")
        self.length += 1
        return self.resume(token)

    def close(self) -> None:
        """Forget the text."""
        if self.running is not None and not self.running.dead:
            with torch.inference_mode():
                self.running.throw(GreenletExit)
        self.running, self.length = None, 0

    def resume(self, given: Any) -> Float[Tensor, " vocabulary"]:
        """Let `generate` go on until it has logits."""
        assert self.running is not None
        with torch.inference_mode(), quiet_transformers():  # both would leak out of a greenlet
            logits: Tensor = self.running.switch(given)
        return logits

    def generate(self, prompt: Int64[Tensor, "1 tokens"]) -> None:
        """Generate in the greenlet."""
        from transformers import LogitsProcessorList

        caller = greenlet.getcurrent().parent

        def hand_over(ids: Tensor, scores: Tensor) -> Tensor:
            token = caller.switch(scores[0].float().cpu())
            only = torch.full_like(scores, -torch.inf)
            only[0, token] = 0
            return only

        self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEVER,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([hand_over]),
            **PLAIN,
        )
