"""Cuts of GGUF files: llama.cpp computes what it does with the other parts switched off."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from gguf import GGUFValueType
from gguf_models import byte_level, save, sentencepiece_model
from switched_off import logits_of
from trained import source_text

import secateur
from secateur.errors import ArchitectureError, RecipeError, SecateurError
from secateur.exporting.gguf.cut import cut_of, cuttable
from secateur.exporting.gguf.cut_experts import experts_of
from secateur.exporting.gguf.cut_layers import FileLayers
from secateur.exporting.gguf.cut_tokens import tokens_of_texts
from secateur.exporting.gguf.edit import written
from secateur.exporting.gguf.llama_cpp import LlamaCpp
from secateur.models.gguf_file import Field, FilePart, GGUFSource, StoredTensor
from secateur.progress import Silent

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"decoder_sparse_step": 1},
}
WINDOWS = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(0))
DOCUMENTS = [source_text()[at : at + 300] for at in range(0, 3000, 300)]


@pytest.fixture(scope="module", params=FAMILIES)
def file(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture in float32: 3 layers of 5 experts."""
    place = tmp_path_factory.mktemp("mixture")
    source = save(place / "model", byte_level(), request.param, **FAMILIES[request.param])
    secateur.export(source, output=place / "out", type="f32")
    (made,) = (place / "out").iterdir()
    return made


def test_experts_that_leave_are_as_if_switched_off(file: Path, tmp_path: Path) -> None:
    source, kept = GGUFSource.read(file), {0: (0, 2, 4), 1: (1, 2, 3), 2: (0, 1, 4)}
    [made, *_] = written(source, cut_of(source, experts=kept), tmp_path / "cut.gguf")
    off = {layer: {*range(5)} - {*stay} for layer, stay in kept.items()}
    found, whole = logits_of(made, WINDOWS), logits_of(file, WINDOWS)
    torch.testing.assert_close(found, logits_of(file, WINDOWS, off), rtol=1e-4, atol=1e-4)
    assert (found - whole).abs().max() > 0.1
    read = GGUFSource.read(made)
    assert (read.get("expert_count"), read.get("expert_used_count")) == (3, 2)
    assert read.tensors["blk.1.ffn_gate_inp.weight"].shape[0] == 3
    one = source.tensors["blk.1.ffn_down_exps.weight"].read((1, 2, 3))
    assert np.array_equal(one, read.tensors["blk.1.ffn_down_exps.weight"].read())


@pytest.mark.parametrize("off", [(0,), (1,), (1, 2)])
def test_layers_that_leave_are_as_if_they_returned_their_input(
    off: tuple[int, ...], file: Path, tmp_path: Path
) -> None:
    source = GGUFSource.read(file)
    kept = [layer for layer in range(3) if layer not in off]
    [made, *_] = written(source, cut_of(source, layers=kept), tmp_path / "cut.gguf")
    expected = logits_of(file, WINDOWS, layers=off)
    torch.testing.assert_close(logits_of(made, WINDOWS), expected, rtol=1e-4, atol=1e-4)
    assert FileLayers.of(GGUFSource.read(made)).count == len(kept)


def test_all_three_cuts_together(file: Path, tmp_path: Path) -> None:
    source = GGUFSource.read(file)
    tokens, notes = tokens_of_texts(source, [("text", 1.0, DOCUMENTS)], None, Silent())
    assert (notes["same_documents"], notes["covered"]) == (len(DOCUMENTS), 1)
    assert notes["tokens_after"] == len(tokens) < notes["tokens_before"]
    kept = dict.fromkeys(range(3), (0, 1, 2, 3))
    edit = cut_of(source, experts=kept, layers=(0, 2), tokens=tokens)
    [made, *_] = written(source, edit, tmp_path / "cut.gguf")
    new = torch.randint(len(tokens), (2, 24), generator=torch.Generator().manual_seed(1))
    ids = torch.tensor(tokens)
    expected = logits_of(file, ids[new], dict.fromkeys(range(3), (4,)), layers=(1,))
    torch.testing.assert_close(logits_of(made, new), expected[..., ids], rtol=1e-4, atol=1e-4)


# -- tokens --------------------------------------------------------------------------------------

TOKEN_TABLES = ("token_embd.weight", "output.weight")

KINDS = {"is_unknown": 2, "is_control": 3, "is_byte": 6}
"""Types of tokens, by what SentencePiece calls them."""


BERT = {0: "PAD", 100: "UNK", 101: "CLS", 102: "SEP", 103: "MASK"}
"""The special tokens that llama.cpp expects where no key names them."""


@pytest.fixture(scope="module", params=["bpe llama", "unigram t5", "bpe bert"])
def words(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the vocabulary of a SentencePiece model, and no tensors."""
    kind, name = request.param.split()
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(kind))
    file = tmp_path_factory.mktemp("words") / "words.gguf"
    entries = []
    for n in range(model.get_piece_size()):
        own = next((number for name, number in KINDS.items() if getattr(model, name)(n)), 1)
        entries.append((model.id_to_piece(n), model.get_score(n), own))
    if name == "bert":
        special = [(f"[{BERT.get(n, n)}]", 0.0, 3 if n in BERT else 5) for n in range(104)]
        entries = [*special, *(entry for entry in entries if entry[2] == 1)]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model(name)
    listed, scores, types = zip(*entries, strict=True)
    writer.add_token_list(listed)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    if name != "bert":
        writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def ids_of(file: Path, texts: list[str]) -> list[list[int]]:
    with LlamaCpp(file, vocabulary_only=True) as engine:
        return engine(texts)["input_ids"]


def test_lines_whose_tokens_stay_keep_them(words: Path, tmp_path: Path) -> None:
    source = GGUFSource.read(words)
    kept, notes = tokens_of_texts(source, [("text", 1.0, DOCUMENTS[:1])], None, Silent())
    assert len(kept) == notes["tokens_after"] < notes["tokens_before"]
    [made, *_] = written(source, cut_of(source, tokens=kept), tmp_path / "cut.gguf")
    lines = [*source_text()[3000:20_000].splitlines(), "naïve café \u2603", "a\tb  c"]
    same = 0
    for old, new in zip(ids_of(words, lines), ids_of(made, lines), strict=True):
        if set(old) <= set(kept):
            same += 1
            assert [kept[token] for token in new] == old
        assert new
    assert 10 < same < len(lines)
    read, types = GGUFSource.read(made), "tokenizer.ggml.token_type"
    for kind in KINDS.values():  # bytes, control tokens and the unknown one stay
        stay = [(x.fields[types].value == kind).sum() for x in (source, read)]
        assert stay[0] == stay[1]


def test_texts_with_weights_and_sizes_choose_the_tokens(file: Path, tmp_path: Path) -> None:
    source = GGUFSource.read(file)
    texts = [("one", 1.0, DOCUMENTS[:1]), ("two", 3.0, DOCUMENTS[1:])]
    kept, notes = tokens_of_texts(source, texts, 0.1, Silent(), multiple=8)
    assert [(x["text"], x["weight"]) for x in notes["texts"]] == [("one", 1.0), ("two", 3.0)]
    one, two = (x["covered"] for x in notes["texts"])
    assert notes["covered"] == pytest.approx(one / 4 + 3 * two / 4)
    assert 0.9 <= notes["covered"] < 1
    assert len(kept) % 8 == 0
    limit = source.size_bytes - 40 * sum(
        x.row_bytes for name, x in source.tensors.items() if name in TOKEN_TABLES
    )
    kept, notes = tokens_of_texts(source, texts, f"{limit}B", Silent())
    [made, *_] = written(source, cut_of(source, tokens=kept), tmp_path / "cut.gguf")
    assert made.stat().st_size <= limit
    assert notes["tokens_before"] - 60 < notes["tokens_after"] <= notes["tokens_before"] - 40


def test_ids_follow_their_tokens(file: Path) -> None:
    source = GGUFSource.read(file)
    kept, _ = tokens_of_texts(source, [("text", 1.0, ["a b"])], None, Silent())
    edit, tokens = cut_of(source, tokens=kept), "tokenizer.ggml.tokens"
    before, after = (x.fields[tokens].value for x in (source, edit))
    assert after == [before[old] for old in kept]
    names = [name for name in source.fields if name.endswith("_token_id")]
    assert names
    for name in names:
        assert after[edit.fields[name].value] == before[source.fields[name].value]
    pairs = [merge.split(" ") for merge in edit.fields["tokenizer.ggml.merges"].value]
    assert all({first, second, first + second} <= {*after} for first, second in pairs)
    assert len(pairs) < len(source.fields["tokenizer.ggml.merges"].value)


# -- rules for layers, on headers alone ----------------------------------------------------------


def header(architecture: str, layers: int, rests: tuple[str, ...] = (), **keys: Any) -> GGUFSource:
    """The header of a file: 2 tensors in each layer, and more in the layers that `rests` name."""

    def field(value: Any) -> Field:
        if isinstance(value, str):
            return Field(GGUFValueType.STRING, value)
        if isinstance(value, list):
            array = np.array(value)
            kind = GGUFValueType.BOOL if array.dtype == bool else GGUFValueType.INT32
            return Field(GGUFValueType.ARRAY, array, kind)
        return Field(GGUFValueType.UINT32, value)

    named = {"block_count": layers, **keys}
    fields = {f"{architecture}.{name.replace('__', '.')}": field(x) for name, x in named.items()}
    fields["general.architecture"] = field(architecture)
    own = [f"blk.{layer}.{rest}" for layer in range(layers) for rest in ("attn_q", "ffn_up")]
    tensors = {
        name: StoredTensor(name, (8, 32), gguf.GGMLQuantizationType.F32, Path("a"), 0, 1024)
        for name in (*(f"{name}.weight" for name in own), *rests)
    }
    part = FilePart(Path("a.gguf"), fields, tensors, 32, 0, "")
    return GGUFSource((part,), fields, tensors)


def slides(layer: int, period: int, dense_first: bool) -> bool:
    """`set_swa_pattern` of llama.cpp."""
    if dense_first:
        return period == 0 or layer % period != 0
    return period == 0 or layer % period < period - 1


PATTERNS = {
    "gemma3": (6, False),
    "gemma2": (2, False),
    "gpt-oss": (2, False),
    "laguna": (4, True),
    "cohere2": (4, False),
    "modern-bert": (3, True),
    "gemma-embedding": (6, False),
}


@pytest.mark.parametrize("period", [None, 1, 3])
@pytest.mark.parametrize("architecture", PATTERNS)
def test_windows_stay_with_their_layers(architecture: str, period: int | None) -> None:
    default, dense_first = PATTERNS[architecture]
    keys = {} if period is None else {"attention__sliding_window_pattern": period}
    source = header(
        architecture, 8, attention__sliding_window=4, embedding_length=32,
        attention__head_count=4, **keys,
    )  # fmt: skip
    allowed = 0
    for count in (4, 6, 7):
        for kept in combinations(range(8), count):
            same = all(
                slides(old, period or default, dense_first)
                == slides(new, period or default, dense_first)
                for new, old in enumerate(kept)
            )
            allowed += same
            try:
                cut_of(source, layers=kept)
            except RecipeError:
                assert not same
            else:
                assert same
    assert allowed


def test_arrays_and_counts_follow_the_layers() -> None:
    source = header(
        "glm4moe", 7, nextn_predict_layers=1, leading_dense_block_count=2,
        attention__head_count=[1, 2, 3, 4, 5, 6, 7], feed_forward_length=[1, 2, 3, 4, 5, 6],
        rope__dimension_sections=[1, 2, 3, 4, 5, 6], unheard_of=[7, 6, 5, 4, 3, 2, 1],
    )  # fmt: skip
    edit = cut_of(source, layers=(1, 3, 4))
    values = {name.partition(".")[2]: x.value for name, x in edit.fields.items()}
    assert (values["block_count"], values["nextn_predict_layers"]) == (4, 1)
    assert values["leading_dense_block_count"] == 1
    assert values["attention.head_count"].tolist() == [2, 4, 5, 7]
    assert values["feed_forward_length"].tolist() == [2, 4, 5]
    assert values["unheard_of"].tolist() == [6, 4, 3, 1]
    assert len(values["rope.dimension_sections"]) == 6
    assert {name: one.source for name, one in edit.tensors.items() if "attn" in name} == {
        f"blk.{new}.attn_q.weight": f"blk.{old}.attn_q.weight"
        for new, old in enumerate((1, 3, 4, 6))
    }


SIZES = {"embedding_length": 64, "attention__head_count": 4}
REFUSED: dict[str, tuple[str, int, tuple[int, ...], dict[str, Any]]] = {
    "one constant of 40 layers": ("baichuan", 40, (*range(39),), {}),
    "windows of 64 layers": ("exaone4", 64, (*range(60),), {}),
    "the scale of 62 layers": ("gemma3", 62, (*range(60),), {**SIZES, "attention__key_length": 8}),
    "queries of low rank": ("deepseek2", 30, (*range(27),), {"attention__q_lora_rank": 8}),
    "shared keys": ("gemma4", 6, (0, 1, 2, 4, 5), {"attention__shared_kv_layers": 2}),
    "an index of another layer": (
        "glm-dsa", 4, (1, 2, 3), {"attention__indexer__types": [1, 0, 1, 0]},
    ),
    "images": ("granite", 4, (1, 2, 3), {"deepstack_mapping": [0, -1, 1, -1]}),
    "the first layer": ("rwkv7", 4, (1, 2, 3), {}),
    "residual blocks": ("kimi-k3", 6, (0, 2, 3, 4, 5), {"attn_res__block_size": 2}),
    "experts in a period": ("llama4", 8, (*range(4), 5, 6, 7), {
        "interleave_moe_layer_step": 2, "attention__sliding_window": 0,
    }),
    "no rotation": ("smollm3", 8, (*range(3), *range(4, 8)), {}),
    "rescaled weights": ("rwkv6", 12, (*range(1, 12),), {"rescale_every_n_layers": 6}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_cut_that_changes_what_a_layer_is_is_refused(name: str) -> None:
    architecture, layers, kept, keys = REFUSED[name]
    source = header(architecture, layers, **keys)
    with pytest.raises(RecipeError) as error:
        cut_of(source, layers=kept)
    assert error.value.where == architecture
    cut_of(source, layers=range(layers))


def test_constants_of_the_number_of_layers_are_written_out() -> None:
    def written_out(source: GGUFSource, kept: Any) -> dict[str, Any]:
        found = cut_of(source, layers=kept).fields
        return {name: x.value for name, x in found.items() if name not in source.fields}

    lite = header("deepseek2", 27, vocab_size=100)
    assert written_out(lite, range(20)) == {
        "deepseek2.attention.q_lora_rank": 0, "deepseek2.expert_gating_func": 1,
    }  # fmt: skip
    glm = header("deepseek2", 47, vocab_size=154880, attention__q_lora_rank=8)
    assert written_out(glm, range(40)) == {"deepseek2.expert_gating_func": 2}
    found = written_out(header("minicpm", 4), (0, 1))
    assert found["minicpm.residual_scale"] == pytest.approx(1.4 / 4**0.5)
    hybrid = header("qwen3next", 9, nextn_predict_layers=1)
    assert not written_out(hybrid, (0, 1, 2, 3))
    found = written_out(hybrid, (0, 3, 4, 7))
    recurrent = found["qwen3next.attention.recurrent_layers"]
    assert recurrent.tolist() == [True, False, True, False, False]


def test_the_best_layers_of_all_cuts_that_are_possible() -> None:
    source = header(
        "gemma3", 8, attention__sliding_window=4, attention__sliding_window_pattern=3, **SIZES
    )
    scores = torch.rand(8, generator=torch.Generator().manual_seed(0)).tolist()
    for count in range(1, 8):
        ways = []
        for kept in combinations(range(8), count):
            try:
                cut_of(source, layers=kept)
            except RecipeError:
                continue
            ways.append((sum(scores) - sum(scores[layer] for layer in kept), kept))
        assert FileLayers.of(source).best(scores, count) == min(ways)[1]
    shared = header("gemma4", 4, attention__shared_kv_layers=2)
    assert FileLayers.of(shared).best([0, 0, 1, 2], 3) == (0, 1, 3)
    with pytest.raises(RecipeError):
        FileLayers.of(shared).best([1, 1, 1, 1], 1)


# -- rules for experts, on headers alone ---------------------------------------------------------


def mixture_header(more: dict[str, tuple[int, ...]] | None = None, **keys: Any) -> GGUFSource:
    """The header of 2 layers of 8 experts."""
    shapes = {
        "blk.0.ffn_gate_exps.weight": (8, 4, 32),
        "blk.1.ffn_gate_exps.weight": (8, 4, 32),
        "blk.1.ffn_gate_inp.weight": (8, 32),
        "blk.1.ffn_up_shexp.weight": (4, 32),
        **(more or {}),
    }
    plain = header("bailingmoe2", 2, **{"expert_count": 8, "expert_used_count": 4, **keys})
    tensors = {
        name: StoredTensor(name, shape, gguf.GGMLQuantizationType.F32, Path("a"), 0, 4)
        for name, shape in shapes.items()
    }
    return GGUFSource(plain.parts, plain.fields, {**plain.tensors, **tensors})


GROUPS = {"expert_group_count": 4, "expert_group_used_count": 2}
CHUNKS = {"blk.0.ffn_up_chexps.weight": (4, 4, 32)}


@pytest.mark.parametrize(
    ("source", "kept", "numbers"),
    [
        (mixture_header(), (1, 2, 7), [3, 3]),
        (mixture_header(), (0, 1, 2, 5, 7), [5, 4]),
        (mixture_header(**GROUPS), (0, 1, 4, 5, 6, 7), [6, 4, 3, 2]),
        (mixture_header(**GROUPS), (2, 3, 6, 7), [4, 4, 1, 1]),
        (mixture_header(expert_group_count=2, expert_group_used_count=1), (0, 1, 4, 5),
         [4, 2, 2, 1]),
        (mixture_header(CHUNKS, experts_per_group=2), (2, 3, 6, 7), [4, 4]),
    ],
)  # fmt: skip
def test_numbers_of_experts_follow(
    source: GGUFSource, kept: tuple[int, ...], numbers: list[int]
) -> None:
    edit = cut_of(source, experts={0: kept, 1: kept})
    names = ("count", "used_count", "group_count", "group_used_count")
    fields = [edit.fields.get(f"bailingmoe2.expert_{name}") for name in names]
    assert [int(x.value) for x in fields if x is not None] == numbers
    assert edit.tensors["blk.1.ffn_gate_inp.weight"].rows == kept
    assert edit.tensors["blk.1.ffn_up_shexp.weight"].rows is None
    if "blk.0.ffn_up_chexps.weight" in edit.tensors:
        assert edit.tensors["blk.0.ffn_up_chexps.weight"].rows == (1, 3)


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        (mixture_header(), {0: (0, 1)}),  # a layer is missing
        (mixture_header(), {0: (0, 1), 1: (0, 1), 2: (0, 1)}),  # one is too many
        (mixture_header(), {0: (0, 1), 1: (0, 1, 2)}),  # llama.cpp reads one number
        (mixture_header(), {0: (0, 8), 1: (0, 1)}),  # there is no expert 8
        (mixture_header(), {0: (1, 1), 1: (0, 1)}),  # one is named twice
        (mixture_header(), {0: (), 1: ()}),
        (mixture_header(**GROUPS), {0: (0, 1, 2), 1: (0, 1, 2)}),  # groups of 2 and 1
        (mixture_header(**GROUPS), {0: (0, 2), 1: (0, 2)}),  # a group is rated by its best two
        (mixture_header(CHUNKS, experts_per_group=2), {0: (0, 1, 2, 4), 1: (0, 1, 2, 3)}),
    ],
)
def test_choices_that_llama_cpp_cannot_run(source: GGUFSource, kept: Any) -> None:
    with pytest.raises(RecipeError):
        cut_of(source, experts=kept)


@pytest.mark.parametrize(
    ("source", "where"),
    [
        (
            mixture_header({"blk.0.ffn_gate_tid2eid.weight": (9, 2)}),
            "blk.0.ffn_gate_tid2eid.weight",
        ),
        (mixture_header({"blk.0.ffn_new_experts.weight": (8, 2)}), "blk.0.ffn_new_experts.weight"),
        (mixture_header({"blk.0.ffn_up.3.weight": (8, 32)}), "blk.0.ffn_up.3.weight"),
        (mixture_header({"blk.0.ffn_up_exps.weight": (7, 4, 32)}), "blk.0.ffn_up_exps.weight"),
        (mixture_header(expert_news=3), "bailingmoe2.expert_news"),
        (mixture_header(expert_used_count=[2, 2]), "bailingmoe2.expert_used_count"),
    ],
)
def test_what_looks_like_experts_and_is_unknown_is_named(source: GGUFSource, where: str) -> None:
    with pytest.raises(ArchitectureError) as error:
        experts_of(source)
    assert error.value.where == where
    assert where in str(cuttable(source)["experts"])


def test_what_cannot_be_cut_says_why(file: Path) -> None:
    assert cuttable(GGUFSource.read(file)) == dict.fromkeys(("experts", "layers", "tokens"))
    why = cuttable(header("t5", 2, ("dec.blk.0.attn_q.weight",)))
    assert all(why.values())
    with pytest.raises(SecateurError):
        cut_of(header("eagle3", 1, target_layers=[1, 2, 3]), layers=(0,))


ARRAY = GGUFValueType.ARRAY
HOSTILE = [
    None,
    Field(GGUFValueType.STRING, "x"),
    Field(GGUFValueType.FLOAT32, float("nan")),
    Field(GGUFValueType.INT32, -1),
    Field(GGUFValueType.UINT64, 2**63),
    Field(GGUFValueType.UINT32, 0),
    Field(ARRAY, np.arange(3), GGUFValueType.INT32),
    Field(ARRAY, ["a"], GGUFValueType.STRING),
    Field(ARRAY, np.arange(0), GGUFValueType.INT32),
]
"""What a file may have in the place of a value; None: no such key."""


def cut_hostile(source: GGUFSource) -> int:
    """Cut the file with each value changed; how many cuts were refused."""
    refused = 0
    experts = dict.fromkeys(range(3), (0, 1))
    for name in source.fields.keys() - {"general.architecture"}:
        for value in HOSTILE:
            fields = {key: value if key == name else field for key, field in source.fields.items()}
            known = {key: field for key, field in fields.items() if field is not None}
            hostile = GGUFSource(source.parts, known, source.tensors)
            for cut in ({"experts": experts}, {"layers": (0, 2)}, {"tokens": range(250)}):
                try:
                    cut_of(hostile, **cut)  # type: ignore[arg-type]
                except SecateurError:
                    refused += 1
    return refused


def test_hostile_values_are_refused_by_our_errors(file: Path) -> None:
    assert cut_hostile(GGUFSource.read(file)) > 50


def test_hostile_vocabularies_are_refused_by_our_errors(words: Path) -> None:
    assert cut_hostile(GGUFSource.read(words)) > 20


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_headers_are_refused_by_our_errors(name: str) -> None:
    architecture, layers, _, keys = REFUSED[name]
    assert cut_hostile(header(architecture, layers, **keys)) > 5
