"""`secateur structure FILE.gguf --output SMALLER.gguf`, and what `inspect` shows of a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_bytes import ARRAY, F32, Q4_K, SOUND, STRING, U32, Bytes, array, key, number, tensor, text
from gguf_models import byte_level, save

import secateur
from secateur.errors import ArchitectureError, RecipeError, SecateurError
from secateur.exporting.gguf.llama_cpp import LlamaCpp
from secateur.models.gguf_file import GGUFSource
from secateur.reporting.gguf_files import CutFileResult, InspectFileResult
from secateur.steps import cut_file

UP, ROUTER = "blk.{}.ffn_up_exps.weight", "blk.{}.ffn_gate_inp.weight"
LISTED = {"0": [1, 2], "1": [0, 3], "2": [2, 3]}


def mixture(parts: int = 1) -> list[Bytes]:
    """Three layers of four experts, in one file or in one for each layer."""
    keys = (
        key("general.architecture", STRING, text("qwen3moe")),
        key("general.name", STRING, text("A mixture")),
        key("qwen3moe.block_count", U32, number(3)),
        key("qwen3moe.expert_count", U32, number(4)),
        key("qwen3moe.expert_used_count", U32, number(2)),
    )
    layers = [
        ((UP.format(layer), (256, 2, 4), Q4_K, 1152), (ROUTER.format(layer), (8, 4), F32, 128))
        for layer in range(3)
    ]
    split = parts > 1
    found = []
    for part in range(parts):
        own, tensors, at = layers[part : part + 1] if split else layers, [], 0
        for name, sizes, kind, nbytes in (each for layer in own for each in layer):
            tensors.append(tensor(name, sizes, kind, at))
            at += nbytes
        data = bytes((7 * i + i // 256 + part) % 256 for i in range(at))
        sizes = {"split.no": part, "split.count": parts, "split.tensors.count": 6}
        more = tuple(key(name, U32, number(n)) for name, n in sizes.items()) if split else ()
        found.append(Bytes(keys=(() if part else keys) + more, tensors=tuple(tensors), data=data))
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    [content] = mixture()
    (tmp_path / "m.gguf").write_bytes(content.content)
    return tmp_path / "m.gguf"


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    found = []
    for place, content in enumerate(mixture(3), start=1):
        found.append(tmp_path / f"m-0000{place}-of-00003.gguf")
        found[-1].write_bytes(content.content)
    return found


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    (tmp_path / "experts.json").write_text(json.dumps(LISTED))
    return tmp_path / "experts.json"


def cut(file: Path, **options: Any) -> CutFileResult:
    result = secateur.structure(file, **{"output": file.with_name("out.gguf"), **options})
    assert isinstance(result, CutFileResult)
    return result


def test_listed_experts_are_copied(file: Path, listed: Path) -> None:
    before, content = GGUFSource.read(file), file.read_bytes()
    result = cut(file, experts_list=listed)
    made = GGUFSource.read(result.output)
    for layer, kept in LISTED.items():
        for name in (UP.format(layer), ROUTER.format(layer)):
            assert (made.tensors[name].read() == before.tensors[name].read(kept)).all()
    assert made.get("expert_count") == 2
    assert [x for x in made.fields if not x.startswith("secateur.")] == [*before.fields]
    assert made.fields["secateur.source"].value == "m.gguf"
    [noted] = json.loads(made.fields["secateur.cut"].value)
    assert noted["experts"] == {"by": "list", "kept": LISTED}
    assert noted["before"] == result.before.to_json()
    assert (result.before.experts, result.after.experts) == (4, 2)
    assert result.after.file_bytes == result.output.stat().st_size
    assert file.read_bytes() == content
    assert {x.name for x in file.parent.iterdir()} == {"m.gguf", "out.gguf", listed.name}


def test_layers_are_named_by_number(file: Path) -> None:
    before, result = GGUFSource.read(file), cut(file, layers_list="0,2")
    made = GGUFSource.read(result.output)
    assert made.get("block_count") == 2
    one, two = made.tensors[UP.format(1)], before.tensors[UP.format(2)]
    assert (one.read() == two.read()).all()
    assert UP.format(2) not in made.tensors
    assert result.cut["layers"] == {"by": "list", "kept": [0, 2]}


def test_cuts_add_up_in_the_file(file: Path, listed: Path) -> None:
    first = cut(file, experts_list=listed)
    second = cut(first.output, layers_list="1-2", output=file.with_name("again.gguf"))
    cuts = json.loads(GGUFSource.read(second.output).fields["secateur.cut"].value)
    assert [entry["source"] for entry in cuts] == ["m.gguf", "out.gguf"]
    assert second.before == first.after


def test_the_weights_alone_choose(file: Path) -> None:
    result = cut(file, experts=0.5, experts_by="aimer")
    assert {*map(len, result.cut["experts"]["kept"].values())} == {2}
    again = cut(file, experts=2, experts_by="aimer", output=file.with_name("b.gguf"))
    assert again.cut["experts"] == result.cut["experts"]


def test_a_finished_run_is_shown_and_another_one_refused(file: Path) -> None:
    options = {"experts": 2, "experts_by": "random"}
    made = cut(file, **options)
    content, inode = made.output.read_bytes(), made.output.stat().st_ino
    again = cut(file, **options, resume=True)
    assert (made.output.read_bytes(), made.output.stat().st_ino) == (content, inode)
    assert (again.after, again.before, again.seconds) == (made.after, made.before, None)
    with pytest.raises(RecipeError, match="different"):
        cut(file, **options, seed=1, resume=True)
    with pytest.raises(RecipeError, match="exists"):
        cut(file, **options)
    other = cut(file, **options, seed=1, overwrite=True)
    assert other.cut != made.cut


def test_only_a_gguf_file_is_replaced(file: Path) -> None:
    file.with_name("out.gguf").write_text("my notes")
    with pytest.raises(RecipeError, match="no GGUF file"):
        cut(file, experts=2, experts_by="random", overwrite=True)
    assert file.with_name("out.gguf").read_text() == "my notes"


@pytest.mark.parametrize("content", [SOUND.content, SOUND.content[:-1]])
def test_a_file_that_no_run_has_made_is_not_resumed(content: bytes, file: Path) -> None:
    file.with_name("out.gguf").write_bytes(content)
    with pytest.raises(RecipeError, match="exists"):
        cut(file, experts=2, experts_by="random", resume=True)
    assert file.with_name("out.gguf").read_bytes() == content


@pytest.mark.parametrize("place", [0, 1, 2])
def test_parts_are_cut_into_parts(place: int, parts: list[Path], listed: Path) -> None:
    result = cut(parts[place], experts_list=listed)
    names = sorted(x.name for x in parts[0].parent.glob("out*"))
    assert names == [f"out-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert result.output.name == names[0]
    made, before = GGUFSource.read(result.output), GGUFSource.read(parts[0])
    assert made.get("expert_count") == 2
    for layer, kept in LISTED.items():
        name = UP.format(layer)
        assert (made.tensors[name].read() == before.tensors[name].read(kept)).all()
    assert made.tensors[UP.format(2)].file.name == names[2]


def test_a_layer_that_goes_leaves_a_part_without_tensors(parts: list[Path]) -> None:
    made = GGUFSource.read(cut(parts[0], layers_list="0,2").output)
    assert [len(part.tensors) for part in made.parts] == [2, 0, 2]
    assert made.fields["split.tensors.count"].value == 4


def split(file: Path, place: Path, tensors: int) -> Path:
    """The first part of the same model in parts of so many tensors, by the package `gguf`."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(place, "qwen3moe", split_max_tensors=tensors)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            items = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], items)
    for stored in reader.tensors:
        writer.add_tensor(stored.name, stored.data, raw_dtype=stored.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(place.parent.glob(f"{place.stem}-*"))


@pytest.mark.slow
def test_llama_cpp_reads_parts_of_which_one_is_empty(tmp_path: Path) -> None:
    more: dict[str, Any] = {"num_hidden_layers": 3, "decoder_sparse_step": 1}
    source = save(tmp_path / "model", byte_level(), "qwen3_moe", **more)
    secateur.export(source, output=tmp_path / "f32", type="f32")
    (whole,) = (tmp_path / "f32").iterdir()
    first = split(whole, tmp_path / "split.gguf", 4)
    options: dict[str, Any] = {"layers_list": "0,2", "experts": 2, "experts_by": "aimer"}
    one = cut(whole, **options, output=tmp_path / "one.gguf")
    many = cut(first, **options, output=tmp_path / "many.gguf")
    assert 0 in [len(part.tensors) for part in GGUFSource.read(many.output).parts]
    windows = torch.randint(5, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    with LlamaCpp(one.output) as a, LlamaCpp(many.output) as b:
        for x, y in zip(a.run(windows, logits=True), b.run(windows, logits=True), strict=True):
            assert torch.equal(x, y)  # type: ignore[arg-type]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_kill_between_the_names_of_parts_loses_nothing(
    place: int, overwrite: bool, parts: list[Path], listed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"experts_list": listed, "overwrite": overwrite}
    whole = cut(parts[0], experts_list=listed).output.parent
    expected = {x.name: x.read_bytes() for x in whole.glob("out*")}
    if overwrite:
        cut(parts[0], experts=3, experts_by="random", overwrite=True)
    else:
        for name in expected:
            (whole / name).unlink()
    monkeypatch.setattr(cut_file, "rename", lambda *_: False)
    replace_file, named = Path.replace, []

    def stop(self: Path, target: Path) -> Path:
        if self.parent.name == "model":
            named.append(target)
            if len(named) > place:
                raise KeyboardInterrupt
        return replace_file(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            cut(parts[0], **options)
    cut(parts[0], **options, resume=True)
    assert {x.name: x.read_bytes() for x in whole.glob("out*")} == expected


def test_an_output_that_appears_during_the_run_is_kept(
    file: Path, listed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, write = file.with_name("out.gguf"), cut_file.FileRun.note_finished

    def appears(self: cut_file.FileRun, made: Path) -> None:
        write(self, made)
        output.write_bytes(SOUND.content)

    with monkeypatch.context() as patch:
        patch.setattr(cut_file.FileRun, "note_finished", appears)
        with pytest.raises(RecipeError, match=r"out\.gguf\.partial"):
            cut(file, experts_list=listed)
    assert output.read_bytes() == SOUND.content
    output.unlink()
    assert cut(file, experts_list=listed, resume=True).after.experts == 2


REFUSED: Mapping[str, dict[str, Any]] = {
    "ffn": {"ffn": 0.5, "experts": 2},
    "hidden_size": {"hidden_size": 0.5, "experts": 2},
    "kv_groups": {"kv_groups": 0.5, "experts": 2},
    "keep_parameters": {"keep_parameters": 0.5, "experts": 2},
    "effort": {"effort": "best", "experts": 2},
    "score": {"score": "wanda", "ffn": 0.5},
    "distill_epochs": {"distill_epochs": 1, "experts": 2},
    "device": {"device": "cuda:0", "experts": 2},
    "dtype": {"dtype": "bfloat16", "experts": 2},
    "experts_by divergence": {"experts_by": "divergence", "experts": 2},
    "experts_scope global": {"experts_scope": "global", "experts": 2},
    "depth_by": {"depth_by": "greedy", "keep_layers": 2},
    "layers_list": {"layers_list": "0-1,x"},
    "experts.json": {"experts_list": "experts.json"},
    "layers": {"layers_list": "0-7"},
    "keeps everything": {"experts": 4, "experts_by": "random"},
    "keeps 9 experts": {"experts": 9},
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("dry_run", [False, True])
def test_what_a_cut_of_bytes_cannot_do_is_refused_by_name(
    name: str, dry_run: bool, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    with pytest.raises(SecateurError) as raised:
        secateur.structure(file, output="out.gguf", dry_run=dry_run, **REFUSED[name])
    assert name in str(raised.value)
    assert raised.value.remedy or "must be" in str(raised.value)
    assert [x.name for x in file.parent.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("content", ["[1, 2]", '{"0": "all"}', '{"a": [1]}', '{"0": [0.5]}', "{"])
def test_a_list_of_experts_is_numbers_by_layer(content: str, file: Path, listed: Path) -> None:
    listed.write_text(content)
    with pytest.raises(RecipeError) as raised:
        cut(file, experts_list=listed)
    assert raised.value.where == str(listed)


def test_options_of_files_are_refused_for_folders(file: Path) -> None:
    with pytest.raises(RecipeError, match="GGUF"):
        secateur.structure(file.parent, output=file.with_name("out"), layers_list="0-1")


def test_the_output_is_not_the_source(file: Path, parts: list[Path]) -> None:
    with pytest.raises(RecipeError, match="source itself"):
        cut(file, experts=2, experts_by="random", output=file, overwrite=True)
    for part in parts:
        with pytest.raises(RecipeError, match="source"):
            cut(part, experts=2, experts_by="random", output=file, overwrite=True)


def test_a_dry_run_has_the_size_of_the_result(file: Path, listed: Path) -> None:
    plan: Any = secateur.structure(
        file, experts_list=listed, output=file.with_name("out.gguf"), dry_run=True
    )
    assert not file.with_name("out.gguf").exists()
    made = cut(file, experts_list=listed)
    assert plan.before == made.before
    after = plan.after.to_json()
    size = after.pop("file_bytes")
    assert after == {k: v for k, v in made.after.to_json().items() if k != "file_bytes"}
    assert 0 <= made.after.file_bytes - size < 4096  # the keys that say what was cut


# -- inspect -------------------------------------------------------------------------------------


def test_inspect_reads_the_header_alone(file: Path) -> None:
    result = secateur.inspect(file)
    assert isinstance(result, InspectFileResult)
    counts = result.counts
    assert (counts.architecture, counts.name) == ("qwen3moe", "A mixture")
    assert (counts.layers, counts.experts, counts.experts_used) == (3, 4, 2)
    assert counts.parameters == 3 * (256 * 2 * 4 + 8 * 4)
    assert counts.file_bytes == file.stat().st_size
    kinds = {name: (own.tensors, own.bytes) for name, own in counts.types.items()}
    assert kinds == {"Q4_K": (3, 3 * 1152), "F32": (3, 3 * 128)}
    assert counts.bits_per_weight == pytest.approx(8 * 3 * 1280 / counts.parameters)
    assert result.cuts["experts"] is None
    assert "tokenizer" in str(result.cuts["tokens"])
    assert result.to_json()["parameters"] == counts.parameters
    assert "Q4_K" in str(result)


def test_inspect_of_parts(parts: list[Path]) -> None:
    result: Any = secateur.inspect(parts[1])
    assert result.counts.parts == 3
    assert result.counts.file_bytes == sum(x.stat().st_size for x in parts)


def test_inspect_shows_the_largest_count_where_layers_differ(file: Path) -> None:
    [content] = mixture()
    counts = key("qwen3moe.expert_count", ARRAY, array(U32, 3, b"".join(map(number, (4, 0, 8)))))
    keys = tuple(x for x in content.keys if b"expert_count" not in x)
    file.write_bytes(replace(content, keys=(*keys, counts)).content)
    result: Any = secateur.inspect(file)
    assert (result.counts.experts, result.counts.experts_used) == (8, 2)
    assert result.cuts["experts"]


def test_an_unknown_architecture_is_inspected_and_not_cut(tmp_path: Path) -> None:
    keys = (key("general.architecture", STRING, text("tomorrow")), *SOUND.keys[1:])
    file = tmp_path / "m.gguf"
    file.write_bytes(replace(SOUND, keys=keys).content)
    result: Any = secateur.inspect(file)
    assert result.counts.architecture == "tomorrow"
    assert all(result.cuts.values())
    with pytest.raises((ArchitectureError, RecipeError)):
        cut(file, experts=2, experts_by="random")
    assert [x.name for x in tmp_path.iterdir()] == ["m.gguf"]
