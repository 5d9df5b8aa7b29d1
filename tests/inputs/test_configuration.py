"""A `config.json` that does not fit the weights is refused at once, whatever it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from zoo import CONFIGS, MIXTURES

import secateur
from secateur.errors import ArchitectureError, CheckpointError
from secateur.models.checkpoint import CheckpointReader
from secateur.models.configuration import check_sizes
from secateur.models.opening import load_whole
from secateur.models.skeleton import build_skeleton, stored_names

DEEP = '{"model_type": "llama", "a": ' + "[" * 100_000 + "]" * 100_000 + "}"


def change(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **changes}))


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 10**9}, "is 1000000000, and the weights have 3 layers"),
    ({"num_hidden_layers": 4}, "num_hidden_layers is 4, and the weights have 3 layers"),
    ({"num_hidden_layers": "three"}, "num_hidden_layers is 'three', not a whole number"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is '0', not a whole number from 1"),
    ({"num_hidden_layers": True}, "num_hidden_layers is 'True', not a whole number"),
    ({"hidden_size": 10**12}, "hidden_size is 1000000000000, and no stored tensor is larger than"),
    ({"hidden_size": 64.5}, "hidden_size is '64.5', not a whole number"),
    ({"hidden_size": 64}, "config.json asks for"),
    ({"vocab_size": 10**12}, "vocab_size is 1000000000000, and no stored tensor is larger"),
    ({"num_attention_heads": 0}, "num_attention_heads is '0', not a whole number from 1"),
    ({"num_attention_heads": 5}, "5 attention heads cannot share 2 heads of keys and values"),
    ({"num_attention_heads": 5, "num_key_value_heads": 5}, ""),
    ({"num_key_value_heads": -1}, "num_key_value_heads is '-1', not a whole number"),
    ({"head_dim": 10**15}, "head_dim is 1000000000000000, and no stored tensor"),
    ({"intermediate_size": 10**15}, "config.json asks for (32, 1000000000000000)"),
    ({"intermediate_size": "many"}, ""),
    ({"max_position_embeddings": 10**12}, "no model has as many"),
    ({"hidden_act": "nonsense"}, "hidden_act is 'nonsense', which transformers does not know"),
    ({"num_hidden_layers": 1}, "2 of 3 stored layers are not in the configuration, which has 1"),
    ({"rope_parameters": 7}, ""),
    ({"model_type": "no_such_type"}, "no class for no_such_type"),
    ({"model_type": ["llama"]}, "has no 'model_type'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "what"), CHANGES)
def test_numbers_that_do_not_fit(refused, model: Path, changes, what: str) -> None:
    change(model, **changes)
    assert what in refused("inspect", model)


def test_a_configuration_that_is_nested_too_deeply(refused, model: Path) -> None:
    (model / "config.json").write_text(DEEP)
    assert "nested too deeply" in refused("inspect", model)


@pytest.mark.parametrize("family", [*CONFIGS, *MIXTURES])
def test_every_family_of_the_zoo_fits_its_own_weights(tmp_path: Path, family: str) -> None:
    folder = save_tiny(tmp_path / "m", family, tokenizer=False)
    check_sizes(folder)
    stored_names(build_skeleton(folder), CheckpointReader(folder))
    load_whole(folder, torch.device("cpu"))


def add(folder: Path, **tensors: torch.Tensor) -> None:
    """Store other tensors, too; an underscore between two is a dot."""
    file = folder / "model.safetensors"
    more = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})


DAMAGES: list[tuple[dict[str, Any], dict[str, torch.Tensor], str]] = [
    ({"num_hidden_layers": 1}, {}, "2 of 3 stored layers are not in the configuration"),
    ({}, {"model__layers__9__mlp__up_proj__weight": torch.ones(3, 3)},
     "1 of 4 stored layers are not in the configuration, which has 3"),
    ({}, {"model__layers__1__mlp__up_proj__weight": torch.ones(48, 32, dtype=torch.int32)},
     "model.layers.1.mlp.up_proj.weight: torch.int32"),
    ({"vocab_size": 90}, {}, "is stored, config.json asks for (90, 32)"),
]  # fmt: skip
WORDS = {
    "inspect": (),
    "prune": ("--method", "magnitude", "--sparsity", 0.5, "-o", "out"),
    "generate": ("--prompt", "a"),
    "evaluate": ("--text", "t.txt"),
    "train": ("--text", "t.txt", "--steps", 1, "-o", "out"),
    "compress": ("-o", "out"),
    "export": ("-o", "out"),
    "structure": ("--ffn", 0.5, "--score", "magnitude", "--calibration", "t.txt", "-o", "out"),
}


@pytest.mark.parametrize(("changes", "tensors", "said"), DAMAGES)
@pytest.mark.parametrize("verb", WORDS)
def test_weights_of_another_model_are_refused_by_every_verb(
    refused, model: Path, monkeypatch: pytest.MonkeyPatch, verb: str, changes, tensors, said: str
) -> None:
    monkeypatch.chdir(model.parent)
    Path("t.txt").write_text("Some words to read, and some more of them. " * 400)
    change(model, **changes)
    add(model, **tensors)
    assert said in refused(verb, model, *WORDS[verb])
    assert not list(Path().glob("out*"))


FURTHER: list[tuple[str, dict[str, torch.Tensor]]] = [
    ("deepseek_v3", {"model__layers__3__eh_proj__weight": torch.ones(32, 64)}),
    ("glm4_moe", {"model__layers__3__eh_proj__weight": torch.ones(32, 64)}),
    ("qwen3_next", {"mtp__layers__9__mlp__up_proj__weight": torch.ones(4, 8)}),
    ("llama", {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(8)}),
    ("llama", {"vision_tower__blocks__9__up_proj__weight": torch.ones(4, 8)}),
]


@pytest.mark.parametrize(("family", "tensors"), FURTHER)
def test_tensors_that_transformers_leaves_out_are_no_damage(
    tmp_path: Path, family: str, tensors
) -> None:
    folder = save_tiny(tmp_path / "m", family, tokenizer=False)
    add(folder, **tensors)
    stored_names(build_skeleton(folder), CheckpointReader(folder))
    load_whole(folder, torch.device("cpu"))
    if family in ("deepseek_v3", "glm4_moe"):  # one further layer, not two
        add(folder, model__layers__4__mlp__up_proj__weight=torch.ones(4, 8))
        with pytest.raises(CheckpointError, match="1 of 5"):
            load_whole(folder, torch.device("cpu"))


def test_surplus_experts_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "mixtral", tokenizer=False)
    change(folder, num_local_experts=2)
    with pytest.raises(CheckpointError, match=r"config\.json|experts"):
        stored_names(build_skeleton(folder), CheckpointReader(folder))


@pytest.mark.parametrize("archive", [False, True])
def test_a_compressed_folder_fits_and_10_to_9_layers_do_not(
    refused, model: Path, tmp_path: Path, archive: bool
) -> None:
    secateur.compress(
        model, output=tmp_path / "c", archive=archive, embeddings="int8", values="int8"
    )
    check_sizes(tmp_path / "c")
    change(tmp_path / "c", num_hidden_layers=10**9)
    assert "3 layers" in refused("inspect", tmp_path / "c")
    assert "3 layers" in refused("generate", tmp_path / "c", "--prompt", "a")


def test_heads_of_a_family_whose_shapes_do_not_tell_them(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "gpt_neox", tokenizer=False)
    change(folder, num_attention_heads=5)
    with pytest.raises(CheckpointError, match="5 attention heads"):
        build_skeleton(folder)


def rewrite(folder: Path, names: dict[str, str | None]) -> None:
    """Rename tensors, or drop those that are to be called None."""
    file = folder / "model.safetensors"
    tensors = {names.get(n, n): t for n, t in load_file(file).items()}
    tensors.pop(None, None)
    save_file(tensors, file, metadata={"format": "pt"})


RENAMED: dict[str, str | None] = {
    "model.layers.1.mlp.up_proj.weight": "model.layers.1.mlp.sideways.weight"
}
DROPPED: dict[str, str | None] = {"model.layers.1.mlp.up_proj.weight": None}


@pytest.mark.parametrize("names", [RENAMED, DROPPED])
def test_a_checkpoint_that_lacks_a_matrix(refused, model: Path, tmp_path: Path, names) -> None:
    rewrite(model, names)
    missing = "model.layers.1.mlp.up_proj.weight"
    assert missing in refused("inspect", model)
    out = tmp_path / "out"
    assert missing in refused("prune", model, "--method", "magnitude", "--sparsity", 0.5, "-o", out)
    assert not out.with_name("out.partial").exists()
    assert missing in refused("compress", model, "--output", out)
    # transformers draws it at random and goes on
    assert missing in refused("generate", model, "--prompt", "a")


def test_what_a_checkpoint_may_lack(tmp_path: Path) -> None:
    tied = save_tiny(tmp_path / "m", "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    load_whole(tied, secateur.runs.environment.choose_device("cpu"))


def test_code_of_the_checkpoint_is_refused_as_an_error(refused, model: Path) -> None:
    change(model, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
           model_type="evil")  # fmt: skip
    (model / "evil.py").write_text("raise SystemExit('it ran')")
    message = refused("generate", model, "--prompt", "a")
    assert "--trust-remote-code" in message
    assert "it ran" not in message


def test_memory_that_is_full_is_not_blamed_on_the_model(model: Path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", full)
    with pytest.raises(MemoryError):
        build_skeleton(model)


def test_whatever_transformers_raises_is_an_error_of_ours(model: Path, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise IndexError

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", broken)
    with pytest.raises(ArchitectureError, match="IndexError"):
        build_skeleton(model)
