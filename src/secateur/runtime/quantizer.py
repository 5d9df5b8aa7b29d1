"""The quantizer with which transformers loads compressed folders: `quant_method: secateur`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from secateur.errors import CheckpointError, KernelError
from secateur.models.architecture import experts_of
from secateur.models.checkpoint import PACKED_INDEX_NAME, QUANT_METHOD
from secateur.models.experts import open_experts
from secateur.runtime.formats import part_suffixes
from secateur.runtime.install import install
from secateur.runtime.packed import VERSION, PackedCheckpoint


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfigMixin):
    """The entry of `config.json` for a compressed folder.

    Args:
        version: of the format.
        archive: whether the files are compressed further.
        activations: how activations are rounded that meet integers; None without integers.
    """

    def __init__(
        self,
        version: int = VERSION,
        archive: bool = False,
        activations: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.version, self.archive, self.activations = version, archive, activations


@register_quantizer(QUANT_METHOD)
class PackedQuantizer(HfQuantizer):
    """Installs packed modules in the model before transformers loads the rest."""

    quantization_config: PackedConfig

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """Remember the dtype of the computation."""
        self.dtype = dtype or torch.get_default_dtype()
        return self.dtype

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse archives and devices other than the CPU.

        Raises:
            CheckpointError: the folder is an archive.
            KernelError: `device_map` names another device than the CPU.
        """
        if self.quantization_config.archive:
            raise CheckpointError(
                "from_pretrained cannot read an archive",
                remedy="use secateur.load(FOLDER), or unpack it with `secateur decompress`",
            )
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if any(str(p) not in ("None", "cpu", "auto", "disk") for p in places):
            raise KernelError(
                f"packed matrices are multiplied on the CPU, not on {device_map}",
                remedy="leave device_map out; for a GPU use secateur.load(FOLDER, device='cuda')",
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the weight files; only here a quantizer sees the configuration.

        transformers does not look for these file names. So without secateur it finds no weights,
        and does not draw the packed matrices at random.
        """
        config.transformers_weights = PACKED_INDEX_NAME
        return config

    # releases of transformers before update_attn_implementation pass the configuration to this
    update_tp_plan = update_attn_implementation

    def update_device_map(self, device_map: Any) -> Any:
        """Put everything on the CPU."""
        return None if device_map is None else {"": "cpu"}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Load packed matrices; transformers loads the rest."""
        folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        if folder is None:
            raise CheckpointError("a compressed model is loaded from its files")
        packed = PackedCheckpoint(folder)
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        # packed experts are stored one by one, and are linears of their own
        open_experts(model)
        with torch.device("cpu"):  # transformers creates everything on meta here
            paths = install(model, packed, self.dtype, matrices_only=True)
        # Or transformers would warn of every packed part that it finds and does not load.
        owners = "|".join(re.escape(name) for name in {*packed.layouts, *paths})
        known = set(model._keys_to_ignore_on_load_unexpected or ())
        parts = "|".join(map(re.escape, part_suffixes()))
        model._keys_to_ignore_on_load_unexpected = known | {rf"^(?:{owners})\.(?:{parts})$"}

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Keep experts as they are stored, one by one, and do not fuse them."""
        experts = experts_of(model)
        if experts is None:
            return weight_conversions
        return [
            *(x for x in weight_conversions if not isinstance(x, WeightConverter)),
            *(WeightRenaming(*pair) for pair in experts.renamings().items()),
        ]

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Refuse to save; only `save_pretrained` calls this, before it writes anything.

        Raises:
            CheckpointError: only `secateur compress` writes packed models.
        """
        raise CheckpointError(
            "a packed model cannot be saved",
            remedy="copy its folder; or load it with expand=True and save that; or run "
            "`secateur decompress FOLDER --output DENSE`",
        )

    @property
    def is_trainable(self) -> bool:
        """Packed weights are for inference."""
        return False


def refuse_saving(model: Any) -> None:
    """Make `save_pretrained` raise: without this, transformers would write no packed weights."""
    model.hf_quantizer = PackedQuantizer(PackedConfig())
