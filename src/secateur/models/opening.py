"""Opens the weights of a folder as dense tensors, and copies them, in whatever form they are.

`load_whole` puts a whole model into memory, for evaluation or generation. A copy of a checkpoint
receives new weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import CheckpointError, RecipeError, install_extra
from secateur.models import at_rest, checkpoint, configuration, skeleton
from secateur.progress import Progress, Silent, each_step
from secateur.runs.output import write_json, writing
from secateur.types import FLOATS

DENSE = "name the checkpoint in float32, bfloat16 or float16 it was made from"
LOADED = (
    "; or load it with transformers where its library runs, call model.dequantize(), and save it "
    "with save_pretrained"
)
REMEDIES: Mapping[str, str] = {
    **dict.fromkeys(("bitsandbytes", "hqq", "quanto", "eetq", "aqlm", "vptq"), DENSE + LOADED),
    "gguf": "name the .gguf file itself",
}
"""What to do about forms that are not read."""


EXPANDED = ("awq", "fp8", "gptq", "modelopt", "mxfp4")
"""Forms that our reader expands. compressed-tensors may round activations too: its own library does
that while the model runs."""


def refuse_quantized(folder: Path) -> None:
    """Refuse a checkpoint whose weights are not plain numbers."""
    method = form_of(folder)
    if method is None:
        return
    if method == checkpoint.QUANT_METHOD:
        raise CheckpointError(
            "the checkpoint is compressed already",
            where=str(folder),
            remedy="run `secateur decompress DIR --output DENSE` and name that",
        )
    raise CheckpointError(
        f"the checkpoint is quantized ({method})",
        where=str(folder),
        remedy="run `secateur import DIR --output DENSE` and name that"
        if method in at_rest.stored_forms
        else REMEDIES.get(method, DENSE),
    )


def _method_of(config: Mapping[str, Any]) -> str | None:
    """What a configuration calls the form of its weights; None if it names none."""
    named = config.get("quantization_config")
    if named is not None and not isinstance(named, dict):
        return str(named)
    described = configuration.described_by(config)
    return str(described.get("quant_method", "compressed-tensors")) if described else None


def form_of(folder: Path) -> str | None:
    """The name of the form in which the weights of a folder are stored; None for plain tensors."""
    method = _method_of(configuration.read_configuration(folder))
    forms = (at_rest.stored_forms[name] for name in at_rest.stored_forms)
    return next((form.name for form in forms if method in getattr(form, "aliases", ())), method)


def formats_of(source: Path, result: Path) -> dict[str, str] | None:
    """How the weights of two folders are stored; None if the source stores plain numbers."""
    form = form_of(source)
    if form is None:
        return None
    dense = str(computed_dtype(result)).removeprefix("torch.")
    return {"source": form, "result": form_of(result) or dense}


def open_weights(folder: Path) -> checkpoint.CheckpointReader:
    """A reader of the dense tensors of a folder, in whatever form they are stored.

    Raises:
        CheckpointError: a file is damaged or missing, or the form is not read.
        ArchitectureError: the source needs what a plain model cannot express.
    """
    reader, config = checkpoint.CheckpointReader(folder), configuration.read_configuration(folder)
    if configuration.is_plain(config):
        return reader
    source = at_rest.SourceFolder(folder, config, reader, computed_dtype(folder))
    for name in at_rest.stored_forms:
        if at_rest.stored_forms[name].recognises(source):
            return at_rest.stored_forms[name].open(source)
    refuse_quantized(folder)
    return reader


def computed_dtype(folder: Path) -> torch.dtype:
    """The dtype in the configuration; bfloat16 if it names no supported one."""
    for part in configuration.with_text(configuration.read_configuration(folder)):
        named = str(part.get("dtype", part.get("torch_dtype")))
        if named in FLOATS:
            return FLOATS[named]
    return torch.bfloat16


def load_whole(folder: Path, device: torch.device, *, dtype: torch.dtype | None = None) -> Any:
    """Load a checkpoint folder with plain transformers, in eval mode.

    Args:
        folder: the checkpoint. Its own model code runs if it is a `TrustedFolder`.
        device: where the model goes.
        dtype: of its parameters; None keeps the stored one.

    Raises:
        CheckpointError: the configuration does not fit the weights, or some are missing.
        ArchitectureError: transformers cannot build the model, or it needs its own code.
    """
    from transformers import AutoConfig

    configuration.check_sizes(folder)
    form = form_of(folder)
    if form == "compressed-tensors" and find_spec("compressed_tensors") is None:
        raise RecipeError(
            "compressed-tensors, which computes this model, is not installed",
            where=str(folder),
            remedy=install_extra("compressed-tensors"),
        )
    loaded: Any
    report: dict[str, Any]
    with skeleton.quiet_transformers(), configuration.transformers_errors(folder):
        # transformers 5.24 loads experts without the scale that they have for a whole matrix
        scaled = form is not None and any(
            ".experts." in name and name.endswith(".weight_global_scale")
            for name in checkpoint.CheckpointReader(folder).entries
        )
        if form in EXPANDED or scaled:
            loaded, report = _load_expanded(folder, dtype)
        else:
            trust = isinstance(folder, configuration.TrustedFolder)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
            loaded, report = skeleton.auto_class(config).from_pretrained(
                folder,
                dtype=dtype or "auto",
                trust_remote_code=trust,
                output_loading_info=True,
                ignore_mismatched_sizes=form is None,
            )
            if form is None:
                skeleton.stored_names(loaded, checkpoint.CheckpointReader(folder), split=False)
    # transformers draws missing ones at random, and says so only in its log
    skeleton.refuse_missing(sorted(report["missing_keys"]), {}, folder)
    loaded = loaded.to(device).eval()
    if getattr(loaded, "hf_quantizer", None) is not None:
        # compressed-tensors expands weights when the whole model is called first; we call its parts
        with torch.no_grad():
            loaded(torch.zeros(1, 1, dtype=torch.long, device=device))
    return loaded


def load_body(folder: Path) -> Any:
    """Load a model without its head, in the dtype in which it is stored."""
    from transformers import AutoModel

    trust = isinstance(folder, configuration.TrustedFolder)
    with skeleton.quiet_transformers(), configuration.transformers_errors(folder):
        return AutoModel.from_pretrained(folder, dtype="auto", trust_remote_code=trust).eval()


def _load_expanded(folder: Path, dtype: torch.dtype | None) -> tuple[Any, dict[str, Any]]:
    """A model whose weights are stored in fewer bits, with what our reader makes of them."""
    from transformers import GenerationConfig

    reader = open_weights(folder)
    built = skeleton.build_skeleton(folder, opened=False)
    for part in (built.config, getattr(built.config, "text_config", None)):
        if part is not None and hasattr(part, "quantization_config"):
            del part.quantization_config
    loaded, report = type(built).from_pretrained(
        None,
        config=built.config,
        state_dict={name: reader.read(name) for name in reader.entries},
        dtype=dtype or computed_dtype(folder),
        output_loading_info=True,
    )
    if (folder / "generation_config.json").is_file():
        loaded.generation_config = GenerationConfig.from_pretrained(folder)
    return loaded, report


OF_A_FORM = ("quantize_config.json", "quant_config.json", configuration.OF_MODELOPT)
LEFT_OUT = ("config.json", *checkpoint.INDEX_NAMES, *OF_A_FORM)
"""Files of a source that describe the form of its weights, and do not fit its dense copy."""


def copy_of(
    reader: checkpoint.CheckpointReader, folder: Path, *, keep_format: bool = False
) -> checkpoint.PatchedCopy:
    """The copy for a source: in place for plain tensors, else dense or, on demand, in its form."""
    if not isinstance(reader, at_rest.AssembledReader):
        return checkpoint.PatchedCopy(reader, folder)
    return _StoredCopy(reader, folder) if keep_format else _ExpandedCopy(reader, folder)


def weight_bytes_of(reader: checkpoint.CheckpointReader, *, keep_format: bool = False) -> int:
    """The size of the weight files of a copy."""
    if isinstance(reader, at_rest.AssembledReader) and not keep_format:
        return reader.total_bytes
    return sum(file.stat().st_size for file in reader.files)


class _ExpandedCopy(checkpoint.PatchedCopy):
    """A copy whose tensors are dense: the form of the source and its configuration are gone."""

    source: at_rest.AssembledReader

    def create(self, progress: Progress | None = None) -> None:
        """Write all tensors dense, and copy the other files. Replaces files of the same names."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with writing(self.folder):
            checkpoint.copy_others(self.source.folder, self.folder, LEFT_OUT)
            write_json(self.folder / "config.json", self.source.config)
        write_dense(self.source.unsplit(), self.folder, progress or Silent())
        self._dirty |= {self.folder / "config.json", *self.folder.glob("*.safetensors")}

    @cached_property
    def target(self) -> checkpoint.CheckpointReader:
        """The copy, as it shows the tensors of the source."""
        written = checkpoint.CheckpointReader(self.folder)
        for name, parts in self.source.splits.items():
            if name in written.entries:
                written.split(name, parts)
        return written

    def write(self, name: str, tensor: Tensor) -> None:
        """Overwrite one tensor; see `PatchedCopy.write`."""
        checkpoint.PatchedCopy(self.target, self.folder).write(name, tensor)
        self._dirty.add(self.folder / self.target.entries[name].file.name)


class _StoredCopy(checkpoint.PatchedCopy):
    """A copy in the form of the source: new values are rounded to the stored scales.

    Zeros stay zeros, and numbers that did not change keep their bytes.
    """

    source: at_rest.AssembledReader

    def __init__(self, source: at_rest.AssembledReader, folder: Path) -> None:
        super().__init__(source, folder)
        fixed = [name for name, one in source.made.items() if one.back is None]
        if fixed:
            raise RecipeError(
                f"{len(fixed)} matrices are stored as {source.made[fixed[0]].stored_as}, which "
                "cannot take new values",
                where=fixed[0],
                remedy="leave out --keep-format: the result is then written in "
                f"{str(source.made[fixed[0]].dtype).removeprefix('torch.')}",
            )
        self.raw = checkpoint.PatchedCopy(source.stored, folder)

    def create(self, progress: Progress | None = None) -> None:
        """Copy all files; see `PatchedCopy.create`."""
        self.raw.create(progress)

    def write(self, name: str, tensor: Tensor) -> None:
        """Overwrite one tensor in its form; it is cast to the dtype of the model first."""
        owner = self.source.owner.get(name, name)
        if owner not in self.source.made:
            self.raw.write(name, tensor)
            return
        assembly = self.source.made[owner]
        entry = self.source.entries[name]
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointError(
                f"{name}: shape {tuple(tensor.shape)} where {entry.shape} is shown",
                where=str(entry.file),
            )
        parts = {role: self.stored_now(part) for role, part in assembly.parts.items()}
        values = tensor.detach().to("cpu", assembly.dtype)
        if owner != name:
            # one of several tensors that a made one is shown as: the others keep their values
            whole = assembly.make(parts).to(assembly.dtype).contiguous()
            at_rest.view_in(whole, entry).copy_(values)
            values = whole
        assert assembly.back is not None
        for role, part in assembly.back(values, parts).items():
            # a part that did not change is not written
            if not torch.equal(_bytes_of(part), _bytes_of(parts[role])):
                self.raw.write(assembly.parts[role], part)

    def stored_now(self, part: str) -> Tensor:
        """A part as it is in the copy."""
        entry = self.source.stored.entries[part]
        return checkpoint.read_entry(replace(entry, file=self.folder / entry.file.name))

    def sync(self) -> None:
        """Return when everything written so far would survive a power cut."""
        self.raw.sync()


def _bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, since not every dtype can be compared."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def write_dense(view: checkpoint.CheckpointReader, folder: Path, progress: Progress) -> None:
    """Write every tensor that a reader shows, and an index if there are several files."""
    files = view.by_file().values()
    shards = {
        checkpoint.shard_name("model", number, len(files)): {
            name: (entry.dtype, entry.shape) for name, entry in mine.items()
        }
        for number, mine in enumerate(files, start=1)
    }
    names = each_step(progress, "writing tensors", [name for mine in files for name in mine])
    checkpoint.write_shards(folder, shards, ((name, view.read(name)) for name in names))
