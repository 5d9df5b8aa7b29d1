"""Structured output: text that follows a JSON schema, a regular expression or a list of choices.

llguidance (optional, extra `structured`) knows which tokens may come next. All others get the logit
-inf before a token is drawn, so whatever is drawn follows the grammar.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.errors import RecipeError, SecateurError, first_line, install_extra

LIMITS = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""Bounds on the work and the memory of a grammar. A tool call with 200 tools needs a fraction."""

MOST_TEXT = 256 << 10
"""Characters of the longest grammar. A longer one would take seconds to read."""

KEPT_GRAMMARS = 8

WHITESPACE = {"whitespace_pattern": " ?"}
"""Between the parts of JSON: a space or none. Where more are allowed, or new lines, small models
write nothing else until the text is full.
"""


class GrammarError(SecateurError):
    """Nothing can follow a text, or it takes too long to find out what can."""


class Grammar:
    """A grammar, and how far a text has come in it.

    Args:
        matcher: llguidance's `LLMatcher`.

    Attributes:
        failed: whether nothing can follow. Then nothing is masked, and the next token is an error.
    """

    def __init__(self, matcher: Any) -> None:
        self.matcher, self.failed = matcher, False

    def begin(self) -> Grammar:
        """The same grammar for another text."""
        return Grammar(self.matcher.deep_copy())

    def masked(self, logits: NDArray[Any], more: Sequence[int] = ()) -> NDArray[Any]:
        """The logits of the tokens that may come next, and -inf for the others.

        Args:
            logits: of all tokens.
            more: tokens that may follow the text. If they do not follow the grammar, nothing is
                masked.
        """
        matcher = self.matcher
        if more:
            matcher = matcher.deep_copy()
            matcher.consume_tokens([*more])
        # a bit for each token, padded to words of 32; `count` may also be more, then bits are 0
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=len(logits), bitorder="little").astype(bool)
        dead = matcher.is_error() or not allowed.any()
        self.failed |= dead and not more
        masked: NDArray[Any] = np.where(allowed, logits, np.float32(-np.inf))
        # a draft may know none of the tokens that are allowed
        return logits if dead or np.isneginf(masked.max()) else masked

    def note(self, token: int) -> None:
        """Append a token to the text.

        Raises:
            GrammarError: the text does not follow the grammar any more.
        """
        if self.failed or not self.matcher.consume_token(token):
            raise GrammarError(
                "the text cannot go on as its grammar says, or the grammar is too complex",
                remedy="use a simpler JSON schema or regular expression",
            )


class Grammars:
    """Reads grammars for a tokenizer, and keeps the last ones.

    Args:
        tokenizer: of the model.
        ends: tokens that end a text; they come where a text may end.

    Raises:
        RecipeError: llguidance is missing, or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int]) -> None:
        llguidance = _llguidance()
        if not ends:
            raise RecipeError("structured output needs a token that ends the text")
        try:
            from llguidance.hf import from_tokenizer

            self.tokenizer = from_tokenizer(tokenizer, eos_token=sorted(ends))
        except ValueError as error:
            raise RecipeError(
                f"structured output cannot read this tokenizer: {first_line(error)[:200]}"
            ) from error
        self.limits = llguidance.LLParserLimits(**LIMITS)
        self.matcher = functools.partial(llguidance.LLMatcher, self.tokenizer, log_level=0)
        self.of = functools.lru_cache(KEPT_GRAMMARS)(self.read)

    def read(self, text: str) -> Grammar:
        """The grammar of a text from `json_text`, `regex_text` or `choice_text`.

        `of` does the same, and keeps the last ones.

        Raises:
            RecipeError: it is too long or too complex, has a fault, or no text follows it.
        """
        if len(text) > MOST_TEXT:
            raise RecipeError(
                f"the grammar has {len(text):,} characters, at most {MOST_TEXT:,} are possible"
            )
        matcher = self.matcher(text, limits=self.limits)
        said = matcher.get_error()
        if not said:
            matcher.compute_bitmask()  # takes longest, and finds out whether there is any text
            said = matcher.get_error() and "no text follows it, or it is too complex"
        if said:
            place = re.compile(r"^at \d+\(\d+\): |^ *\d+ \|.*\n?|^ *\^ *\n?", re.MULTILINE)
            said = " ".join(place.sub("", said).split())
            raise RecipeError(f"the grammar cannot be used: {said[:200]}")
        return Grammar(matcher)


def json_rule(schema: Any) -> str:
    """The JSON values of a schema, as a part of a rule in llguidance's form of Lark."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    options = schema.get("x-guidance")
    options = {**(options if isinstance(options, dict) else {}), **WHITESPACE}
    return "%json " + json.dumps({**schema, "x-guidance": options})


def json_text(schema: Any) -> str:
    """The grammar of a JSON schema."""
    return f"start: {json_rule(schema)}"


def regex_text(regex: str) -> str:
    """The grammar of a regular expression, which the whole text matches."""
    return str(_llguidance().LLMatcher.grammar_from_regex(regex))


def choice_text(choices: Sequence[str]) -> str:
    """The grammar of some texts."""
    return "start: " + " | ".join(map(json.dumps, choices))


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise RecipeError(
            "structured output needs llguidance, which is not installed",
            remedy=install_extra("structured"),
        ) from error
    return llguidance
