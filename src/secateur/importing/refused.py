"""Sources that are refused by name, each with the way to something that can be imported."""

from __future__ import annotations

from pathlib import Path

from secateur.errors import CheckpointError, SourceError
from secateur.models.hub import PICKLES

CONVERT = (
    'python -c "import torch, safetensors.torch as s; s.save_file({{k: v.clone().contiguous() for '
    "k, v in torch.load('{file}', weights_only=True).items()}}, 'model.safetensors')\""
)


def refuse_by_name(source: str) -> None:
    """Refuse pickles, NeMo's archives and Model-Optimizer's checkpoints.

    A pickle is refused even with `weights_only=True`: that is a filter over a format that runs
    code, and code has passed it before (CVE-2025-32434).

    Args:
        source: what the user named; names that are no path are not looked at.

    Raises:
        CheckpointError: pickles.
        SourceError: a checkpoint whose format is not documented.
    """
    path = Path(source).expanduser()
    pickled = [path] if path.is_file() and path.suffix in PICKLES else []
    if path.is_dir() and not any(path.glob("*.safetensors")):
        pickled = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
    if path.suffix == ".nemo" or (path / "context" / "model.yaml").is_file():
        raise SourceError(
            "NeMo's checkpoints are not imported: their format for masks is not documented",
            where=str(path),
            remedy="apply the masks with modelopt.torch.sparsity.export(model), then export the "
            "model to Hugging Face with NeMo's llm.export_ckpt(..., target='hf')",
        )
    if any(file.name.startswith("modelopt") for file in pickled):
        raise SourceError(
            "Model-Optimizer's checkpoints are pickles, and their format is not documented",
            where=str(path),
            remedy="restore the model with modelopt, apply the masks with "
            "modelopt.torch.sparsity.export(model), and save it with save_pretrained",
        )
    if pickled:
        raise CheckpointError(
            f"the weights are pickles ({', '.join(file.name for file in pickled[:4])}), which can "
            "run code when loaded",
            where=str(path),
            remedy="convert them where you trust them, and put config.json and the tokenizer "
            f"beside the result: {CONVERT.format(file=pickled[0].name)}",
        )
