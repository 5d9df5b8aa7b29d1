"""Low-rank adapters for a pruned model. Merging them keeps every zero.

An ordinary adapter trains a dense B·A beside the sparse weight. Merging it fills the zeros. If the
mask then removes them again, the result differs from the trained model. Here the mask is part of
the forward from the first step:

    y = x · ((W₀ + α/r · B A) ⊙ M)ᵀ        M: where W₀ is not zero

So the merged model is the trained model. The adapters and their files are peft's.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.engine.prune.tasks import Selection, refuse_idle_globs
from secateur.errors import RecipeError, VerificationError, install_extra
from secateur.models.architecture import Linear
from secateur.models.skeleton import quiet_transformers
from secateur.recipes.train import LoraOptions
from secateur.training.masks import Masks, first_names, prunable

if TYPE_CHECKING:
    from peft import PeftModel
else:
    PeftModel = Any  # peft is optional, and takes seconds to import

ADAPTERS_ALONE = {"*": 0.0, "*.lora_[AB].*": 1.0}
"""`rates` of a `TrainingPlan` that trains only adapters. Pass the loop the model inside peft's
wrapper, `adapted.get_base_model()`."""


def chosen_linears(model: nn.Module, options: LoraOptions) -> list[Linear]:
    """The linear layers of the decoder layers that get an adapter.

    Raises:
        RecipeError: there is none, a glob matches none, or the rank is larger than a side.
    """
    linears, selection = prunable(model), Selection(options.targets, options.exclude)
    refuse_idle_globs([*options.targets, *options.exclude], [x.name for x in linears])
    chosen = [linear for linear in linears if selection.selects(linear.name)]
    if not chosen:
        raise RecipeError(
            "targets and exclude leave no linear to put an adapter on",
            remedy=f"loosen them; there are {', '.join(x.name for x in linears[:4])}, …",
        )
    narrow = [linear for linear in chosen if options.rank > min(linear.shape)]
    if narrow:
        raise RecipeError(
            f"rank {options.rank} is more than the shorter side of {len(narrow)} matrices",
            where=narrow[0].name,
            remedy="--lora 8 to 64 are usual",
        )
    return chosen


def attach(model: Any, options: LoraOptions | None = None, seed: int = 0) -> PeftModel:
    """Put adapters on a pruned model, in place; everything else is frozen.

        W = (W₀ + alpha/rank · B A) ⊙ M,   A [rank, in],  B [out, rank]        only A, B learn

    B begins as zeros, so the adapters do not change the model's function at first. The current
    zeros of the weights are the mask.

    Papers: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
    arXiv:2106.09685; the mask on the product as in SparsePEFT, Muñoz et al. 2024, "SQFT: Low-cost
    Model Adaptation in Low-precision Sparse Foundation Models", arXiv:2410.03750. Deviation from
    SparsePEFT: the rank is fixed; there is no search for it.

    Args:
        model: a pruned causal language model.
        options: rank and other settings; None for the defaults.
        seed: seed of A's first values.

    Returns:
        The model in peft's wrapper. Train it, save its adapters, `merge` it.

    Raises:
        RecipeError: peft is not installed, or there is no linear for an adapter.
    """
    options = options or LoraOptions()
    chosen = chosen_linears(model, options)
    peft = need_peft()

    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=2.0 * options.rank if options.alpha is None else options.alpha,
        lora_dropout=options.dropout,
        target_modules=[linear.name for linear in chosen],
        fan_in_fan_out=chosen[0].transposed,
        bias="none",
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({type(linear.module): _masked_adapter() for linear in chosen})
    # peft draws A from the generator of the process, whose state must stay as it was
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


@cache
def _masked_adapter() -> Any:
    """The layer behind `attach`. peft, its base, is optional and takes seconds to import."""
    from peft.tuners.lora import Linear as Adapter

    class MaskedAdapter(Adapter):
        """x · ((W₀ + scaling · B A) ⊙ M)ᵀ + bias for a linear or a Conv1D.

        peft merges the result of `get_delta_weight`, so its own methods keep the zeros too.

        Args:
            base_layer: the pruned linear; its zeros are the mask.
            adapter_name: the name of the adapter.
            config: peft's configuration.
            **kwargs: the arguments that peft passes to its own layers.
        """

        kept: Tensor

        def __init__(
            self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any
        ) -> None:
            super().__init__(base_layer, adapter_name, config=config, **kwargs)
            kept = base_layer.get_parameter("weight").detach() != 0
            self.register_buffer("kept", kept, persistent=False)

        def get_delta_weight(self, adapter: str) -> Tensor:
            """Return the product to add to the weight: zero where the weight is pruned."""
            delta = super().get_delta_weight(adapter)
            # by selection: a NaN of the product would survive a multiplication by 0
            return torch.where(self.kept, delta, torch.zeros_like(delta))

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Return the output of the masked sum, [..., out]."""
            base = self.base_layer(x, *args, **kwargs)
            if self.disable_adapters or self.merged:
                return base
            added = base
            for name in self.active_adapters:
                # B A is formed [out, in]: x Aᵀ Bᵀ would be cheaper, but has no place for the mask
                delta = self.get_delta_weight(name)
                rows = delta.t() if self.fan_in_fan_out else delta
                inputs = self.lora_dropout[name](x.to(rows.dtype))
                added = added + functional.linear(inputs, rows)
            return added.to(base.dtype)

    return MaskedAdapter


def merge(adapted: PeftModel) -> Any:
    """Return the model with merged adapters of any kind of peft. Zeros of the base stay zeros.

    The masks are the zeros of the base model's matrices. Adapters from `attach` have them in their
    products, so the merged model is the trained one. Adapters trained elsewhere do not: what they
    add to pruned weights is dropped, so the function changes; evaluate the merged model.

    Args:
        adapted: a pruned model in peft's wrapper. The adapters that are active are merged.

    Raises:
        RecipeError: the model has no adapters.
        VerificationError: a weight of an adapter from `attach` that was zero no longer is.
    """
    if not isinstance(adapted, need_peft().PeftModel):
        raise RecipeError(
            f"{type(adapted).__name__} has no adapters to merge: it is no PeftModel",
            remedy="load them first: peft.PeftModel.from_pretrained(model, ADAPTER); from a file, "
            "`secateur import MODEL --adapter ADAPTER --output MERGED` does both",
        )
    base = adapted.get_base_model()
    trained = {
        f"{name}.weight": adapter.kept
        for name, adapter in base.named_modules()
        if isinstance(adapter, _masked_adapter())
    }
    # peft wraps a linear as `x.base_layer`; merging gives it the name `x` again
    found = {
        ".".join(x for x in name.split(".") if x not in ("base_layer", "original_module")): mask
        for name, mask in Masks.of(base).kept.items()
    }
    found |= trained
    merged = adapted.merge_and_unload()
    parameters = dict(merged.named_parameters())
    kept = Masks({name: mask for name, mask in found.items() if name in parameters})
    # adapters from elsewhere fill zeros; those from `attach` must not need this: they are checked
    Masks({name: mask for name, mask in kept.kept.items() if name not in trained}).apply(merged)
    if filled := kept.filled(merged):
        raise VerificationError(
            f"{sum(filled.values())} pruned weights are not zero after merging",
            where=first_names(filled),
            remedy="something filled zeros of the base model: load the pruned model again, and "
            "attach the adapters to it",
        )
    return merged


def need_peft() -> Any:
    """Import peft, which is optional.

    Raises:
        RecipeError: peft is not installed.
    """
    try:
        import peft
    except ImportError as missing:
        raise RecipeError(
            "adapters need the package peft, which is not installed",
            remedy=install_extra("lora"),
        ) from missing
    return peft
