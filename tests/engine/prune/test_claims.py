"""What a solver says that it did is compared with the weights that it left."""

from __future__ import annotations

from typing import Any

import pytest
from zoo import tiny_model

import secateur
from secateur.errors import VerificationError
from secateur.sparsity.methods import Method


def test_zeros_that_only_the_mask_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = Method.solve

    def lying(self: Method, weight: Any, *rest: Any) -> Any:
        return solve(self, weight, *rest)._replace(weight=weight.clone())

    monkeypatch.setattr(Method, "solve", lying)
    with pytest.raises(VerificationError, match="the weight 0") as error:
        secateur.prune(tiny_model("llama"), method="magnitude", sparsity=0.5)
    assert "q_proj" in str(error.value.where)


def test_a_mask_with_too_few_zeros_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = Method.solve

    def lazy(self: Method, weight: Any, *rest: Any) -> Any:
        found = solve(self, weight, *rest)
        mask = found.mask.clone()
        mask[0] = True
        return found._replace(mask=mask)

    monkeypatch.setattr(Method, "solve", lazy)
    with pytest.raises(VerificationError, match="should have"):
        secateur.prune(tiny_model("llama"), method="magnitude", sparsity=0.5)
