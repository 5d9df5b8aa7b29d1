"""The recipe of `secateur advise`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from secateur.recipes.memory import RemoteCode
from secateur.recipes.section import HOW, OUTPUT, WHAT, Flag, Recipe, Section


class WhatToServe(Section):
    """The model, the hardware and the load."""

    group: ClassVar[str] = WHAT

    model: Annotated[str, Flag(value="MODEL")] = Field(
        description="Hub id, folder (config.json is enough), named sample, or a well-known shape "
        "such as llama-3.1-8b."
    )
    hardware: str = Field(
        "this-machine",
        description="What it runs on: a100-80gb, h100-80gb, h200, l40s, rtx-4090, laptop-cpu, "
        "raspberry-pi-5, this-machine, or a name from --facts.",
    )
    requests_per_day: float = Field(1000.0, gt=0, description="Requests on an average day.")
    tokens_per_request: int = Field(500, ge=2, description="Tokens of prompt and answer together.")
    new_tokens: Annotated[int | None, Flag(default="half of them")] = Field(
        None, ge=1, description="Tokens of the answer alone."
    )


class Bounds(Section):
    """What has to be kept."""

    group: ClassVar[str] = HOW

    latency_p99_ms: Annotated[float | None, Flag(default="any")] = Field(
        None, gt=0, description="Largest time between two tokens of an answer, for 99 of 100."
    )
    first_token_ms: Annotated[float | None, Flag(default="any")] = Field(
        None, gt=0, description="Largest time to the first token on an idle device."
    )
    quality_loss: float = Field(
        0.01, ge=0, lt=1, description="The fraction of the task accuracy that may be lost."
    )
    gpu_hours: Annotated[float | None, Flag(default="any")] = Field(
        None, ge=0, description="Most GPU hours for making the model."
    )
    peak: float = Field(2.0, ge=1, description="How many times the average the busiest moment has.")
    utilisation: float = Field(
        0.7, gt=0, le=1, description="The fraction of a device's time that may be planned."
    )
    usd_per_hour: Annotated[float | None, Flag(default="from the facts")] = Field(
        None, ge=0, description="What you pay for one device."
    )
    facts: Annotated[str | None, Flag(value="FILE", default="the built-in ones")] = Field(
        None, description="YAML with your own hardware, prices, losses or shapes."
    )


class AdviseRecipe(Bounds, RemoteCode, WhatToServe, Recipe):
    """One advice."""

    group: ClassVar[str] = OUTPUT

    html: Annotated[str | None, Flag(value="FILE", default="none")] = Field(
        None, description="Also write a page with the advice and sliders to vary the load."
    )

    @model_validator(mode="after")
    def check_tokens(self) -> AdviseRecipe:
        """An answer is a part of the request's tokens."""
        if self.new_tokens is not None and self.new_tokens >= self.tokens_per_request:
            raise ValueError(
                f"--new-tokens {self.new_tokens}: must be less than --tokens-per-request "
                f"{self.tokens_per_request}, which counts prompt and answer"
            )
        return self

    def answer_tokens(self) -> int:
        """Tokens of the answer."""
        return self.new_tokens or self.tokens_per_request // 2

    def explain(self) -> dict[str, Any]:
        """The load in words, for the result."""
        answer = self.answer_tokens()
        return {
            "requests_per_day": self.requests_per_day,
            "prompt_tokens": self.tokens_per_request - answer,
            "new_tokens": answer,
            "latency_p99_ms": self.latency_p99_ms,
            "first_token_ms": self.first_token_ms,
            "quality_loss": self.quality_loss,
            "gpu_hours": self.gpu_hours,
            "peak": self.peak,
            "utilisation": self.utilisation,
        }
