"""Compares calibration on a model's own conversations with web text (docs/methods/calibration.md).

    python -m benchmarks.quality.chat_calibration --c4 c4.jsonl --tasks FOLDER \\
        --text wikitext=wiki.txt c4=held-out.txt --work FOLDER

The conversations: 200 prompts (questions of sciq and goals of piqa, from row 500 on; "Summarize
this text:" with web pages of the last fifth of the C4 file), answered by the dense model with its
chat template, temperature 0.7, at most 112 new tokens. 36 more prompts, answered greedily, are held
out. Then a preset at 50 % on 64 windows of 512 tokens: of C4, of the conversations, of both.
Judged on the first 4 windows of 1024 tokens of each text; on the held-out answers (next-token loss,
share of tokens that the pruned model would choose as well, and how many tokens it would write
before it differs). One seed. What is finished is kept; `--only` names the calibrations.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import add, markdown
from benchmarks.stored import known_rows

import secateur
from secateur.calibration.documents import Chat, read_documents, read_text
from secateur.calibration.windows import evaluation_windows
from secateur.evaluation.perplexity import perplexity
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.runtime.load import load

MEASURES = ("src/secateur/calibration",)

MODEL = "smollm2-135m"
KEPT, HELD_OUT, NEW_TOKENS, AT_ONCE, TEMPERATURE = 200, 36, 112, 40, 0.7
LENGTH, WINDOWS = 1024, 4
NAME = "chat-calibration"
FIRST_ROW = 500
"""Rows of tasks before it are left to the judging."""


def prompts(c4: Path, tasks: Path) -> list[str]:
    """A question, a goal, a text to summarize, and so on in this order."""

    def rows(file: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    each = -(-(KEPT + HELD_OUT) // 3)
    questions = [row["question"] for row in rows(tasks / "sciq.jsonl")]
    goals = [row["goal"] for row in rows(tasks / "piqa.jsonl")]
    pages = [row["text"] for row in rows(c4)]
    pages = pages[len(pages) * 4 // 5 :]
    found = zip(
        questions[FIRST_ROW : FIRST_ROW + each],
        goals[FIRST_ROW : FIRST_ROW + each],
        [f"Summarize this text:\n\n{page[:600]}" for page in pages[:each]],
        strict=True,
    )
    return [prompt for three in found for prompt in three][: KEPT + HELD_OUT]


@torch.no_grad()
def answers(model: Any, tokenizer: Any, asked: list[str], *, sampled: bool) -> list[str]:
    """The dense model's answers, in batches that are padded on the left."""
    torch.manual_seed(0)
    tokenizer.padding_side = "left"
    found = []
    for start in range(0, len(asked), AT_ONCE):
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in asked[start : start + AT_ONCE]
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        how = {"do_sample": True, "temperature": TEMPERATURE} if sampled else {"do_sample": False}
        new = model.generate(**batch, max_new_tokens=NEW_TOKENS, **how)
        found += tokenizer.batch_decode(
            new[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        print(f"{len(found)} of {len(asked)} answers", flush=True)
    return found


def write(args: argparse.Namespace) -> None:
    """Write the conversations of the dense model, unless they are there."""
    folder = resolve(MODEL).folder
    tokenizer, asked = load_tokenizer(folder), prompts(args.c4, args.tasks)
    model = load(folder)
    for name, some, sampled in (
        ("chats", asked[:KEPT], True),
        ("held-out", asked[KEPT:], False),
    ):
        file = args.work / f"{name}.jsonl"
        if not file.exists():
            pairs = zip(some, answers(model, tokenizer, some, sampled=sampled), strict=True)
            lines = [
                json.dumps(
                    {
                        "messages": [
                            {"role": "user", "content": prompt},
                            {"role": "assistant", "content": answer},
                        ]
                    }
                )
                for prompt, answer in pairs
                if answer.strip()
            ]
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")


@torch.no_grad()
def answered(model: Any, tokenizer: Any, file: Path) -> dict[str, float]:
    """Compares a model's next tokens in held-out conversations with the dense model's."""
    losses, agreed, prefixes = [], [], []
    for chat in read_documents(str(file)):
        assert isinstance(chat, Chat)
        ids, marks = (torch.tensor(x) for x in chat.marked(tokenizer))
        logits = model(input_ids=ids[None]).logits[0, :-1].float()[marks[1:]]
        targets = ids[1:][marks[1:]]
        same = logits.argmax(-1) == targets
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
        agreed.append(same)
        prefixes.append(int(same.int().cumprod(0).sum()))
    return {
        "answer_loss": float(torch.cat(losses).mean()),
        "agreement": float(torch.cat(agreed).float().mean()),
        "same_tokens": sum(prefixes) / len(prefixes),
    }


def judge(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Every number of a model."""
    model, tokenizer = load(folder), load_tokenizer(folder)
    found: dict[str, Any] = {"loss": {}}
    for name, file in (text.split("=", 1) for text in args.text):
        windows = evaluation_windows(read_text(file).text, tokenizer, LENGTH, max_windows=WINDOWS)
        found["loss"][name] = perplexity(model, windows).mean_loss
    return found | answered(model, tokenizer, args.work / "held-out.jsonl")


def table(rows: list[dict[str, Any]]) -> str:
    """The table of the docs: losses above those of the dense model."""
    dense = next(row for row in rows if row["calibration"] == "dense")
    texts = list(dense["loss"])
    shown = []
    for row in rows:
        excess = [f"{row['loss'][text] - dense['loss'][text]:.3f}" for text in texts]
        answers = [f"{row['answer_loss'] - dense['answer_loss']:.3f}", f"{row['agreement']:.1%}"]
        shown.append([row["calibration"], *excess, *answers, f"{row['same_tokens']:.1f}"])
    return markdown(
        ["calibration", *texts, "held-out answers", "same token", "tokens alike"], shown
    )


def main() -> None:
    """Write the conversations, prune, judge, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--c4", type=Path, required=True, help="JSON lines")
    parser.add_argument("--tasks", type=Path, required=True, help="rows, as of --task-data")
    parser.add_argument("--text", nargs="+", required=True, help="NAME=FILE, to judge")
    parser.add_argument("--work", type=Path, required=True, help="where conversations are kept")
    parser.add_argument("--effort", default="balanced", help="the preset")
    parser.add_argument("--only", nargs="*", help="calibrations to measure; all by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    write(args)
    chats = args.work / "chats.jsonl"
    calibrations = {
        "dense": "",
        "C4": str(args.c4),
        "conversations": str(chats),
        "half of each": f"{args.c4}=1,{chats}=1",
    }
    protocol = {"model": MODEL, "preset": args.effort, "sparsity": 0.5, "windows": "64 x 512"}
    for name, source in calibrations.items():
        measured = any(row["calibration"] == name for row in known_rows(NAME))
        if measured or (args.only and name not in args.only):
            continue
        output = args.work / name.replace(" ", "-")
        if source and not output.exists():
            secateur.prune(
                MODEL, output=output, effort=args.effort, sparsity=0.5, calibration=source,
                windows=64, sequence_length=512,
            )  # fmt: skip
        row = judge(output if source else resolve(MODEL).folder, args)
        add(NAME, protocol, {"calibration": name, **row})
        shutil.rmtree(output, ignore_errors=True)
        print(name, row, flush=True)
    print(table(known_rows(NAME)))


if __name__ == "__main__":
    main()
