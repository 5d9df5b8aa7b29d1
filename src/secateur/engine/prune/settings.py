"""How the work of a run is done."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.engine.prune.reconstruction import Reconstruction
from secateur.parallel.ranks import ALONE, Ranks
from secateur.precision import fast_matmuls

NO_RECONSTRUCTION = Reconstruction(passes=0)


@dataclass(frozen=True)
class Settings:
    """How the work of a run is done. The task of a linear sets its sparsity.

    Attributes:
        sequential: `group` prunes each group of linears before the next one's statistics are
            gathered, in one pass; `layer` gathers for a whole layer first, as the papers do.
        asymmetric: fit each linear to its outputs in the dense model (`dense_target`), not to its
            outputs on the pruned model's inputs. The dense model then runs in step, group by
            group.
        asymmetric_damping: strength of the pull towards the dense weights, as a fraction of the
            mean diagonal of the gram.
        choose_damping: choose that strength for each linear on held-out tokens.
        fast_matmuls: run calibration forwards in bfloat16 if the processor is faster at it.
        micro_batch_tokens: tokens that pass through a layer at once.
        activations: `gpu`, `memory` or `disk`: the storage of hidden states.
        work: folder for hidden states, ledger and gradients; None only for a run in memory.
        on_collapse: `stop` or `warn` when a layer has collapsed (`engine.prune.group_pruning`).
        reconstruction: how a pruned layer is tuned; with 0 passes it is not tuned.
        ranks: the processes that share the work.
    """

    sequential: str = "group"
    asymmetric: bool = False
    asymmetric_damping: float = 0.2
    choose_damping: bool = False
    fast_matmuls: bool = False
    micro_batch_tokens: int = 2048
    activations: str = "memory"
    work: Path | None = None
    on_collapse: str = "warn"
    reconstruction: Reconstruction = NO_RECONSTRUCTION
    ranks: Ranks = ALONE

    @property
    def in_memory(self) -> bool:
        """Whether hidden states are in memory, of the host or of the GPU."""
        return self.activations != "disk"

    @property
    def on_gpu(self) -> bool:
        """Whether hidden states and halted forwards stay in the memory of the GPU."""
        return self.activations == "gpu"

    @property
    def tunes(self) -> bool:
        """Whether pruned layers are tuned."""
        return self.reconstruction.passes > 0

    @property
    def dense_needed(self) -> bool:
        """Whether the dense model's hidden states pass as well."""
        return self.tunes or self.asymmetric

    def matmuls(self, device: torch.device) -> AbstractContextManager[object]:
        """A context for the forwards of calibration on a device."""
        return fast_matmuls(device) if self.fast_matmuls else nullcontext()
