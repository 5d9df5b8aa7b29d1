"""Write docs/families.md: what works with which model. It is made from declarations and the zoo.

python tools/families_page.py          # write the page
python tools/families_page.py --check  # fail if it is out of date

A yes stands for a test: every model of `tests/support/zoo.py` is pruned, saved and loaded by
`tests/steps/prune/test_zoo.py`, cut by the tests in `tests/structured`, trimmed by
`tests/structured/test_vocabulary_of_families.py` and `test_embedders.py`, packed by
`tests/runtime/test_load_every_model.py`, and written as GGUF by `tests/exporting/test_gguf.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from written_files import table, write_or_check

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs/families.md")
sys.path.insert(0, str(ROOT / "tests/support"))

YES, NO = "yes", ""
Said = TypeVar("Said")

KINDS = (
    ("Decoders", ("CONFIGS", "DENSE"), "Attention and a feed-forward in every layer."),
    ("Hybrids", ("HYBRIDS",), "Layers of several kinds. Their linear layers are pruned. "
     "Convolutions, states (`A_log`, `D`, `dt_bias`) and norms stay, and the manifest "
     "names what stays."),
    ("Models that see", ("SEEING",), "The decoder inside is pruned with text. Everything else "
     "stays byte for byte. See [models that see](seeing.md)."),
    ("Mixtures of experts", ("MIXTURES",), "Every expert is pruned like a linear layer. See "
     "[experts](methods/experts.md)."),
)  # fmt: skip

_STATES = "it has layers with states or convolutions"
_LATENT = "its keys and values are compressed (latent attention)"
_SEES = "pictures go through parts that only transformers runs"
OUTSIDE: Mapping[str, str] = {
    "gpt2": "its positions are learned",
    "opt": "its positions are learned",
    "gpt_neox": "query, key and value of a head lie together in one matrix",
    "gptj": "its modules have other names, which nobody has described",
    "olmo": "its norms have no weights",
    "apertus": "its activation is xIELU",
    "bloom": "its positions are slopes (ALiBi)",
    "falcon": "queries, keys and values lie in one matrix, in an order of its own",
    "ministral3": "its queries are scaled by their position",
    "phimoe": "its router picks two experts in turn",
    "llama4_text": "its attention is chunked, and the router scales inputs",
    "gemma3n_text": "it has several hidden states for a token (AltUp)",
    "gemma4_text": "its layers have heads of two sizes, and some share keys",
    **dict.fromkeys(("minimax_m3_vl_text", "glm_moe_dsa"), "its attention is sparse"),
    "deepseek_v4": "it has several hidden states for a token (hyper-connections)",
    "hy_v3": "the correction of its router is beside it, which nobody has described",
    "step3p5": "its heads have gates",
    **dict.fromkeys(("qwen3_5_text", "lfm2", "recurrent_gemma", "mamba", "mamba2"), _STATES),
    **dict.fromkeys(("falcon_h1", "bamba", "granitemoehybrid", "nemotron_h"), _STATES),
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text", "lfm2_moe"), _STATES),
    **dict.fromkeys(("glm4_moe_lite", "deepseek_v2", "deepseek_v3"), _LATENT),
    **dict.fromkeys(("gemma3", "gemma4", "gemma3n", "step3p7", "qwen3_5", "llava"), _SEES),
    **dict.fromkeys(("mistral3", "qwen2_5_vl", "qwen3_vl", "smolvlm", "llama4"), _SEES),
}
"""Why types that are known, but not in `layer_forms.FORMS`, are decoded by transformers."""


TOKENIZERS = {
    "byte-level": "BPE of bytes", "characters": "BPE of characters", "clip": "BPE with a suffix",
    "bert": "WordPiece", "unigram of letters": "Unigram",
}  # fmt: skip
"""How the kinds of `tests/support/tokenizers_of_kinds.py` are called."""


def main() -> None:
    """Write the page, or check it."""
    write_or_check(ROOT, {PAGE: "\n".join(page()) + "\n"}, "families_page.py")


def page() -> Iterator[str]:
    """The lines of the page."""
    import zoo

    yield "# What works with which model"
    yield ""
    yield (
        f"Tests build {len(zoo.ZOO)} tiny models from the configurations of transformers. Every "
        "entry of this page is such a test. `python tools/families_page.py` writes the page from "
        "`tests/support/zoo.py` and the declarations in `src/secateur/models/families`."
    )
    yield ""
    yield "- **pruned**, all but one of the last section: to 50 % and 2:4 by Wanda (mixtures by"
    yield "  magnitude), zeros counted by hand, saved, loaded by plain transformers; the model"
    yield "  generates the same with and without a cache."
    yield "- **cut**: the cut model computes what the uncut one computes with the same units"
    yield "  switched off, and transformers loads it."
    yield "- **packing**: `secateur compress` packs it, and what `secateur.load` loads computes the"
    yield "  same."
    yield "- **fast decoding**: one call of Secateur's kernels computes a token, and one a prompt."
    yield "  The others are decoded by transformers, whose linear layers may be packed."
    yield "- **GGUF**: `secateur export --to gguf` writes it; the last section has its refusals."
    yield ""
    yield "Tests of `gemma3n vision` run where `timm` is installed."
    yield ""
    yield "A model that is not on this page is treated by the generic description: `prune` works"
    yield "on every decoder whose layers are made of linear layers, `structure` removes whole"
    yield "layers, and what cannot be done is refused with the reason."
    yield ""
    yield "Some names differ: GLM-5 is `glm_moe_dsa`, Hy3 `hy_v3`, Qwen3.6 and Qwen3.8 are"
    yield "`qwen3_5`. Where the installed transformers has no class, as 5.24 for Kimi K3, cut a"
    yield "[GGUF file](gguf.md) of the model, which needs none."
    yield ""
    for title, kinds, said in KINDS:
        yield f"## {title}"
        yield ""
        yield said
        yield ""
        can = {name: abilities(name) for name in sorted(x for k in kinds for x in getattr(zoo, k))}
        columns = ("models", "cut", "packing", "fast decoding", "GGUF")
        yield from table(columns, ((names, *words) for names, words in alike(can)))
    yield from fewer_tokens()
    yield from reasons()


def fewer_tokens() -> Iterator[str]:
    """The models whose vocabulary a test cuts."""
    import zoo

    yield "## Fewer tokens"
    yield ""
    yield "`structure --vocabulary` [removes tokens](structure/vocabulary.md) of these. In a test,"
    yield "texts whose tokens all stay become the same tokens, with the same logits or embeddings"
    yield "to float rounding. All other tensors keep their bytes. transformers loads the folder."
    yield ""
    yield from table(("decoders", "tables of tokens"), alike(zoo.TRIMMED))
    yield "Copies of tables in MTP layers are cut too, and tables in int8, int4, FP8 or NVFP4."
    yield ""
    kinds = {name: TOKENIZERS[kind] for name, (_, kind, *_) in zoo.EMBEDDERS.items()}
    yield from table(("embedding models", "tokenizer"), alike(kinds))


def alike(said: Mapping[str, Said]) -> Iterator[tuple[str, Said]]:
    """The names of which the same is said, and what."""
    for words in dict.fromkeys(said.values()):
        yield ", ".join(f"`{name}`" for name in said if said[name] == words), words


def abilities(name: str) -> tuple[str, ...]:
    """What works with a model of the zoo."""
    import zoo

    from secateur.runtime.layer_forms import FORMS

    family, model_type = declared(name)
    can = cuts(name, family)
    words = {"layers": "layers", "groups": "KV groups", "neurons": "FFN", "hidden": "hidden"}
    cut = [word for kind, word in words.items() if kind in can]
    return (
        ", ".join([*cut, *(["experts", "neurons in experts"] if name in zoo.WITH_EXPERTS else [])]),
        NO if name in (*zoo.NOT_LOADED, *zoo.NOT_RUN) else YES,
        YES if model_type in FORMS else NO,
        YES if gguf_refusal(name) == "" else NO,
    )


@cache
def gguf_refusal(name: str) -> str | None:
    """Why a model of the zoo is not written as GGUF; "" if it is, None if no model of its type."""
    import zoo

    from secateur.errors import ExportError
    from secateur.exporting import ExportSource
    from secateur.exporting.gguf.architectures import LLAMA_CPP_FAMILIES, model_of
    from secateur.models.architecture import text_config
    from secateur.models.skeleton import quiet_transformers
    from secateur.runtime.install import open_checkpoint

    config = zoo.config_of(name)
    if text_config(config).model_type not in LLAMA_CPP_FAMILIES:
        return None
    for key, value in zoo.FOR_LLAMA_CPP.get(name, {}).items():
        setattr(text_config(config), key, value)
    with TemporaryDirectory() as folder, quiet_transformers():
        zoo.class_of(config).from_config(config).save_pretrained(folder)
        try:
            model_of(ExportSource(open_checkpoint(Path(folder))))
        except ExportError as error:
            return error.what.rpartition(": ")[2]
    return ""


def declared(name: str) -> tuple[Any, str]:
    """The family of a model of the zoo, and its type in transformers."""
    import zoo

    from secateur.models.architecture import families, text_config

    config = zoo.config_of(name)
    for part in (config, text_config(config)):
        for each in families:
            if part.model_type in families[each].model_types:
                return families[each], config.model_type
    return None, config.model_type


def cuts(name: str, family: Any) -> Iterable[str]:
    """The kinds of units that a test cuts out of a model."""
    import zoo

    if family is None or family.couplings is None:
        return {"layers"} if name == "generic" else set()
    couplings = family.couplings
    can = {"layers", "groups", "neurons", "hidden"} - set(couplings.fixed)
    can -= {"groups"} if couplings.consumer("queries") is None else set()
    can -= {"neurons"} if couplings.consumer("neurons") is None else set()
    if name in zoo.CUT_SEEING:
        return can - {"hidden"} - ({"groups"} if name in zoo.TIED_INSIDE else set())
    if name in zoo.MIXTURES:
        return zoo.CUT_MIXTURES[name]
    if name in zoo.CUT_BY_TOKEN:
        return {"layers", "neurons"}
    known = (*zoo.CONFIGS, *zoo.DENSE, *zoo.CUT_HYBRIDS)
    return can if name in known and name not in zoo.WITH_BUFFERS else set()


def reasons() -> Iterator[str]:
    """Why some units cannot be cut, and what is refused altogether."""
    import zoo

    from secateur.models.architecture import families

    words = {"groups": "KV groups", "hidden": "hidden channels", "neurons": "FFN neurons"}
    yield "## What cannot be cut, and why"
    yield ""
    declared = {name: families[name].couplings for name in sorted(families)}
    lines = [
        (f"`{name}`", words[kind], why)
        for name, couplings in declared.items()
        if couplings is not None
        for kind, why in couplings.fixed.items()
    ]
    yield from table(("family", "units", "reason"), lines)

    yield "## What is not decoded in one call, and why"
    yield ""
    yield from table(
        ("reason", "types"),
        (
            (why, ", ".join(f"`{kind}`" for kind in sorted(OUTSIDE) if OUTSIDE[kind] == why))
            for why in sorted(set(OUTSIDE.values()))
        ),
    )
    yield "## What is refused"
    yield ""
    yield (
        f"`prune` refuses no model above. {', '.join(f'`{name}`' for name in zoo.NOT_RUN)} is "
        "pruned and saved, but transformers cannot run it without a picture, so no test shows "
        "more. `secateur.load` refuses:"
    )
    yield ""
    yield from table(
        ("model", "reason"),
        ((f"`{name}`", said.replace("\\", "")) for name, said in sorted(zoo.NOT_LOADED.items())),
    )
    yield "`secateur export --to gguf` refuses, beside types that it does not know:"
    yield ""
    alike: dict[str, list[str]] = {}
    for name in sorted({*zoo.ZOO, *zoo.SEEING_MIXTURES}):
        if why := gguf_refusal(name):
            alike.setdefault(why, []).append(f"`{name}`")
    yield from (f"- {', '.join(names)}: {why}" for why, names in alike.items())


if __name__ == "__main__":
    main()
