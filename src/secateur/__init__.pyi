"""The public names of secateur, with the keywords of every verb.

Written by tools/option_files.py from the sections in secateur/recipes; do not edit.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from torch import Tensor, nn

from secateur.advisor.advice import AdviseResult
from secateur.errors import SecateurError as SecateurError
from secateur.progress import Progress
from secateur.progress import ProgressBar as ProgressBar
from secateur.report_page.report import report as report
from secateur.reporting.diagnose import DiagnoseResult
from secateur.reporting.evaluate import (
    BenchResult,
    DraftedBenchResult,
    EvaluateResult,
    GenerateResult,
)
from secateur.reporting.fields import Result
from secateur.reporting.fit import DraftedResult, FitResult
from secateur.reporting.gguf_files import CutFileResult
from secateur.reporting.models import (
    ChainResult,
    CompressResult,
    DecompressResult,
    ExportResult,
    ImportResult,
    PruneResult,
    PushResult,
    StructureResult,
    TrainResult,
)
from secateur.reporting.plan import (
    ChainPlanResult,
    CutPlanResult,
    FitPlanResult,
    PlanResult,
    TrainPlanResult,
)
from secateur.reporting.sweep import SweepResult
from secateur.runtime.kernels.library import kernel_info as kernel_info
from secateur.runtime.load import load as load
from secateur.runtime.semi_structured import load_semi_structured as load_semi_structured
from secateur.sparsity.allocation import allocations as allocations
from secateur.sparsity.methods import Method
from secateur.sparsity.methods import compose as compose
from secateur.sparsity.refinements import refinements as refinements
from secateur.sparsity.scores import scores as scores
from secateur.sparsity.solvers import solvers as solvers
from secateur.steps.inspect import inspect as inspect
from secateur.steps.methods import methods as methods
from secateur.training.callback import SecateurCallback as SecateurCallback
from secateur.training.lora import merge as merge

__version__: str
HOMES: dict[str, str]
__all__ = [
    "ProgressBar",
    "SecateurCallback",
    "SecateurError",
    "__version__",
    "advise",
    "allocations",
    "bench",
    "chain",
    "compose",
    "compress",
    "decompress",
    "diagnose",
    "draft",
    "evaluate",
    "export",
    "fit",
    "generate",
    "import_model",
    "inspect",
    "kernel_info",
    "load",
    "load_semi_structured",
    "merge",
    "methods",
    "prune",
    "push",
    "refinements",
    "report",
    "scores",
    "solvers",
    "structure",
    "sweep",
    "train",
]

def advise(
    model: str | Path,
    *,
    progress: Progress | None = None,
    hardware: str | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    batch: int | None = None,
    token_ms: float | None = None,
    quality_loss: float | None = None,
    gpu_hours: float | None = None,
    usd_per_hour: float | None = None,
    facts: str | Path | None = None,
    trust_remote_code: bool | None = None,
) -> AdviseResult:
    """Say what would make a model smaller and quicker, and what that would cost.

    Reads the configuration, no weights. Numbers are measured on this machine, published, or
    estimated by a formula, and say which.

    Args:
        model: Hub id, folder (config.json is enough), named sample, or a well-known shape such as
            llama-3.1-8b.
        progress: receives every step.
        hardware: What it runs on, such as h100-80gb, rtx-4090, m4-24gb, strix-halo-128gb,
            laptop-cpu, this-machine, or a name from --facts. [this-machine]
        prompt_tokens: Tokens in a prompt. [250]
        new_tokens: Tokens of an answer. [250]
        batch: Sequences at once. [as many as pay]
        token_ms: Most milliseconds between two tokens of an answer. [any]
        quality_loss: The fraction of the task accuracy that may be lost. [0.01]
        gpu_hours: Most GPU hours for making the model. [24]
        usd_per_hour: What you pay for the device. [from the facts]
        facts: YAML with your own hardware, prices, losses or shapes. [the built-in ones]
        trust_remote_code: Allow Python code that comes with the checkpoint. [off]

    Raises:
        SecateurError: what, where, and what to do.
    """

def bench(
    model: str | Path,
    *,
    progress: Progress | None = None,
    contenders: Sequence[
        Literal[
            "packed",
            "packed in transformers",
            "dense bf16",
            "dense int8",
            "torch bf16",
            "torch int8",
            "all",
        ]
    ]
    | None = None,
    gguf: Sequence[str | Path] | None = None,
    draft: str | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    rounds: int | None = None,
    device: str | None = None,
) -> BenchResult | DraftedBenchResult:
    """Time a checkpoint at batch 1 with several backends, or with a draft and without, in turns.

    For a run folder, the result is also written to `secateur/bench.json`, unless there is a draft.

    Args:
        model: Folder (compressed or not), hub id or named sample.
        progress: receives every step.
        contenders: Ways to run the model, separated by commas: packed, packed in transformers,
            dense bf16, dense int8, torch bf16, torch int8; or all. On a GPU packed in transformers
            and torch bf16 run. [packed, dense bf16, dense int8, torch bf16]
        gguf: Also time this GGUF file in llama.cpp (needs the extra llamacpp); may be repeated.
            [none]
        draft: Time the model as it is, with this draft and without, on prompts of four kinds:
            prose, code, chat, lists; at temperature 0 and 1. [none]
        prompt_tokens: Tokens in the prompt. [32]
        new_tokens: Tokens to generate in each round. [8, or 64 with a draft]
        rounds: Largest number of rounds. After 30 seconds and two rounds no other one begins. [5]
        device: Where to compute: auto, cpu, cuda or cuda:N. [auto]

    Raises:
        SecateurError: what, where, and what to do.
    """

@overload
def chain(
    model: str | Path,
    *,
    dry_run: Literal[True],
    **options: Any,
) -> ChainPlanResult: ...
@overload
def chain(
    model: str | Path,
    steps: Sequence[Mapping[str, Any]],
    *,
    progress: Progress | None = None,
    trust_remote_code: bool | None = None,
    output: str | Path | None = None,
    overwrite: bool | None = None,
    resume: bool | None = None,
    restart: bool | None = None,
    dry_run: Literal[False] | None = None,
) -> ChainResult:
    """Carry out several verbs. Each reads the result of the previous one.

    All are checked before the first one runs. A stopped chain can resume with different steps if
    its finished steps are the same.

    Args:
        model: The model; on the command line, a YAML file with the keys `model`, `output` and
            `steps`.
        steps: Each step is a verb (structure, prune, train, compress) with its options.
        progress: receives every step.
        trust_remote_code: Allow Python code that comes with the checkpoint. [off]
        output: Folder for the new model. It must not exist. [required]
        overwrite: Replace an existing output folder. [off]
        resume: Resume a stopped run, or start if there is none. A finished one is shown. [off]
        restart: Discard a stopped run and start again. [off]
        dry_run: Check the options and show what the run would need. Reads no weights, and writes
            nothing. [off]

    Raises:
        SecateurError: what, where, and what to do.
    """

def compress(
    model: str | Path,
    *,
    progress: Progress | None = None,
    format: str | None = None,
    values: Literal[
        "auto",
        "keep",
        "bfloat16",
        "float16",
        "float32",
        "int8",
        "int4",
        "int3",
        "int2",
        "q2_k",
        "q3_k",
        "q4_k",
        "q5_k",
        "q6_k",
        "iq4_nl",
        "iq4_xs",
        "q4_0",
        "q4_1",
        "q5_0",
        "q5_1",
        "q8_0",
    ]
    | None = None,
    to: Literal["folder", "gguf"] | None = None,
    group_size: int | None = None,
    overrides: Mapping[str, str] | None = None,
    embeddings: Literal[
        "auto",
        "keep",
        "int8",
        "int4",
        "int3",
        "q2_k",
        "q3_k",
        "q4_k",
        "q5_k",
        "q6_k",
        "iq4_nl",
        "iq4_xs",
        "q4_0",
        "q4_1",
        "q5_0",
        "q5_1",
        "q8_0",
    ]
    | None = None,
    archive: bool | None = None,
    calibration: str | Path | Iterable[str] | None = None,
    field: str | None = None,
    windows: int | None = None,
    sequence_length: int | None = None,
    seed: int | None = None,
    packing: Literal["concatenate", "random-crop"] | None = None,
    distill_epochs: int | None = None,
    distill_tokens: int | None = None,
    distill_teacher: str | Path | None = None,
    distill_learning_rate: float | None = None,
    distill_next_token: float | None = None,
    distill_hidden: float | None = None,
    distill_sweep_windows: int | None = None,
    trust_remote_code: bool | None = None,
    device: str | None = None,
    max_memory: int | str | None = None,
    output: str | Path | None = None,
    activations: Literal["auto", "gpu", "memory", "disk"] | None = None,
    micro_batch_tokens: int | None = None,
    overwrite: bool | None = None,
    resume: bool | None = None,
    restart: bool | None = None,
) -> CompressResult:
    """Write a checkpoint without its zeros.

    With calibration text, int8 weights compensate each other's rounding errors (GPTQ), so the
    outputs stay closer to the source's. Without it, each weight is rounded to the nearest value.

    Args:
        model: Folder, hub id, GGUF file or named sample.
        progress: receives every step.
        format: auto chooses the smallest format for each matrix. bitmask, n-of-m or dense uses that
            format, or dense where dense is smaller. [auto]
        values: How to store the weights. auto stores float32 as bfloat16 and keeps other types.
            keep keeps every type and loses nothing. Or name a type: bfloat16, float16, float32,
            int8, int4, int3, int2; or one of llama.cpp: q2_k to q6_k, iq4_nl, iq4_xs, q4_0, q4_1,
            q5_0, q5_1, q8_0. [auto]
        to: What to write: folder, a packed model; or gguf, one file for llama.cpp with values of
            its types. [folder]
        group_size: How many consecutive weights of a row share a scale in int4, int3 and int2: 32,
            64 or 128. Smaller groups lose less and need 8 / SIZE bits more per weight. [64]
        overrides: Own values for some linear layers, by name; the last match counts. Embedding and
            head have own values by their whole names. [none]
        embeddings: How to store embedding and output head: one matrix if they are tied, else two.
            auto rounds both to int8 beside linear layers of integers if they are a tenth of the
            model or more, and else keeps them, as keep does. Beside types of llama.cpp auto stores
            the head as q6_k and an embedding of its own in their type, as llama.cpp does. int4 and
            int3 have the groups of --group-size; with --calibration the head's weights compensate
            each other's errors. [auto]
        archive: Also compress the files with zstandard. Loading decodes them. [off]
        calibration: Text on which rounded weights compensate each other's rounding errors: JSONL or
            text file, folder of texts, hub data set, named text, or safetensors file of windows.
            auto: c4, or the text that a sample brings. [none]
        field: The field of a JSONL line that holds the text. Lines without it may hold
            conversations (`messages`, `conversations`), which the model's chat template writes.
            [text]
        windows: Number of calibration windows. [128]
        sequence_length: Tokens per window. [2048, or the model's length if that is shorter]
        seed: Seed that chooses the windows. [0]
        packing: concatenate joins all documents and cuts them into windows. random-crop takes each
            window from a random place of a random document, as the papers do. [concatenate]
        distill_epochs: Train the new model to match the dense model, in this many epochs over the
            calibration windows. 0: no distillation. [0]
        distill_tokens: An epoch of the distillation reads at least this many tokens: the
            calibration windows, then more windows of the same text. 0: the calibration windows
            alone. [0]
        distill_teacher: Model to learn from, such as the one that was pruned: hub id, folder or
            named sample. It may have more or wider layers, and has the same vocabulary. [the
            source]
        distill_learning_rate: Highest learning rate of the distillation. The default is 0.25 /
            hidden size · √(tokens in a window / 2048), or less if that is better in short trials.
            [chosen by short trials]
        distill_next_token: Share of the next-token loss, 0 to 1; the rest is the divergence from
            the dense model. [0]
        distill_hidden: Weight of the distance between the outputs of the last decoder layer in both
            models; 0: none. [0]
        distill_sweep_windows: Distill with one decoder layer in memory, in sweeps over this many
            windows: all layers forward, then all layers backward. 0: both whole models in memory.
            [0 if both models fit, else 16]
        trust_remote_code: Allow Python code that comes with the checkpoint. [off]
        device: Where to compute: auto, cpu, cuda or cuda:N. [auto]
        max_memory: Largest peak memory, such as 6GiB: of the GPU if the run computes there, else of
            this process. A run that needs more does not start. [4/5 of the free memory]
        output: Folder for the new model. It must not exist. [required]
        activations: Where to store hidden states between layers: memory of the GPU, of the host, or
            disk; auto uses the first in which they fit. [auto]
        micro_batch_tokens: Tokens in one forward of a layer. [2048]
        overwrite: Replace an existing output folder. [off]
        resume: Resume a stopped run, or start if there is none. A finished one is shown. [off]
        restart: Discard a stopped run and start again. [off]

    Raises:
        SecateurError: what, where, and what to do.
    """

def decompress(
    model: str | Path,
    *,
    progress: Progress | None = None,
    output: str | Path | None = None,
    overwrite: bool | None = None,
) -> DecompressResult:
    """Write a compressed checkpoint as ordinary dense safetensors, with all zeros.

    Losslessly stored values are restored bit for bit. Integers are restored as
    their scaled numbers, in the dtype of the configuration. In bfloat16 those of 4 bits or fewer
    are exact, so compressing them again changes nothing.

    Args:
        model: Folder or hub id of a compressed model.
        progress: receives every step.
        output: Folder for the new model. It must not exist. [required]
        overwrite: Replace an existing output folder. [off]

    Raises:
        SecateurError: what, where, and what to do.
    """

def diagnose(
    model: str | Path,
    *,
    progress: Progress | None = None,
    dense: str | Path | None = None,
    text: str | Path | None = None,
    windows: int | None = None,
    sequence_length: int | None = None,
    trust_remote_code: bool | None = None,
    device: str | None = None,
) -> DiagnoseResult:
    """Look for every known fault of a pruned model.

    For the folder of a pruning run, the result is also written to `secateur/diagnosis.json`.
    A fault of the model is a finding, not an error.

    Args:
        model: Folder (compressed or not), hub id, GGUF file or named sample.
        progress: receives every step.
        dense: The dense model. Compares both models layer by layer. [none]
        text: Text that both models read: a text, or a safetensors file of windows. [boolq-held-out]
        windows: Number of windows of that text. [8]
        sequence_length: Tokens per window. [256, or the model's length if that is shorter]
        trust_remote_code: Allow Python code that comes with the checkpoint. [off]
        device: Where to compute: auto, cpu, cuda or cuda:N. [auto]

    Raises:
        SecateurError: what, where, and what to do.
    """

@overload
def draft(
    model: str | Path,
    *,
    dry_run: Literal[True],
    **options: Any,
) -> Result: ...
@overload
def draft(
    model: str | Path,
    *,
    progress: Progress | None = None,
    runs_as: str | None = None,
    mtp: bool | None = None,
    head: bool | None = None,
    effort: Literal["fast", "balanced", "thorough", "best"] | None = None,
    heal_tokens: int | None = None,
    minutes: float | None = None,
    calibration: str | Path | Iterable[str] | None = None,
    field: str | None = None,
    windows: int | None = None,
    sequence_length: int | None = None,
    seed: int | None = None,
    packing: Literal["concatenate", "random-crop"] | None = None,
    trust_remote_code: bool | None = None,
    device: str | None = None,
    max_memory: int | str | None = None,
    output: str | Path | None = None,
    activations: Literal["auto", "gpu", "memory", "disk"] | None = None,
    micro_batch_tokens: int | None = None,
    overwrite: bool | None = None,
    resume: bool | None = None,
    restart: bool | None = None,
    dry_run: Literal[False] | None = None,
) -> DraftedResult:
    """Find and make the draft of a model that makes it decode fastest.

    The text of the model stays exactly the same: a draft proposes tokens, and the model takes or
    refuses them. A draft is made of the model's own weights, rounded and pruned, and then learns
    from it. What it brings on this machine is known from how often its tokens are taken on text,
    and from the times of both.

    Args:
        model: Folder, hub id, GGUF file or named sample: the parent. The draft is made from its
            weights.
        progress: receives every step.
        runs_as: Folder of the same model as it runs, if it is packed: the draft is measured and
            timed beside it. [MODEL]
        mtp: Make no model, but use the layers that predict further tokens (MTP) of the model
            itself: measure what they bring, and choose the tokens that they propose. [off]
        head: Train a head that reads the hidden states of the model, in place of a smaller model.
            It learns on --heal-tokens tokens, of which the model writes most. By --effort: fast
            131,072, balanced 524,288, thorough 1,048,576, best 2,097,152. [off]
        effort: The preset that prunes, and that decides how much is healed. [balanced]
        heal_tokens: Tokens of the calibration text on which the best models learn from the dense
            one, on their own grids and masks. 0: none. By --effort: fast 0, balanced 65,536,
            thorough 131,072, best 262,144. [by --effort]
        minutes: Time budget in minutes. If it runs short, candidates and healing are left out; the
            result says what. [no limit]
        calibration: Calibration text: JSONL or text file, folder of texts, hub data set, named
            text, or safetensors file of windows. Or several with weights:
            code.jsonl=2,math.jsonl=1. [c4, or the text that a sample brings]
        field: The field of a JSONL line that holds the text. Lines without it may hold
            conversations (`messages`, `conversations`), which the model's chat template writes.
            [text]
        windows: Number of calibration windows. [128]
        sequence_length: Tokens per window. [2048, or the model's length if that is shorter]
        seed: Seed that chooses the windows. [0]
        packing: concatenate joins all documents and cuts them into windows. random-crop takes each
            window from a random place of a random document, as the papers do. [concatenate]
        trust_remote_code: Allow Python code that comes with the checkpoint. [off]
        device: Where to compute: auto, cpu, cuda or cuda:N. [auto]
        max_memory: Largest peak memory, such as 6GiB: of the GPU if the run computes there, else of
            this process. A run that needs more does not start. [4/5 of the free memory]
        output: Folder for the new model. It must not exist. [required]
        activations: Where to store hidden states between layers: memory of the GPU, of the host, or
            disk; auto uses the first in which they fit. [auto]
        micro_batch_tokens: Tokens in one forward of a layer. [2048]
        overwrite: Replace an existing output folder. [off]
        resume: Resume a stopped run, or start if there is none. A finished one is shown. [off]
        restart: Discard a stopped run and start again. [off]
        dry_run: Check the options and show what the run would need. Reads no weights, and writes
            nothing. [off]

    Raises:
        SecateurError: what, where, and what to do.
    """

def evaluate(
    model: str | Path | nn.Module,
    *,
    dense: str | Path | nn.Module | None = None,
    tokenizer: Any = None,
    prompts: Sequence[str] = ...,
    progress: Progress | None = None,
    text: Sequence[str | Path] | None = None,
    tasks: Sequence[str] | None = None,
    generation: bool | None = None,
    kinds: bool | None = None,
    task_data: str | Path | None = None,
    sequence_length: int | None = None,
    windows: int | None = None,
    limit: int | None = None,
    shots: int | None = None,
    trust_remote_code: bool | None = None,
    device: str | None = None,
    max_memory: int | str | None = None,
    output: str | Path | None = None,
) -> EvaluateResult:
    """Measure a model. Each number comes with its protocol and uncertainty.

        secateur.evaluate("pruned", text="boolq-held-out").perplexity
        secateur.evaluate(model, tokenizer=tokenizer, text="other.txt").perplexity
        secateur.evaluate("pruned", dense="smollm2-135m", text="wikitext2", tasks=["hellaswag"])

    A folder that `secateur prune` wrote keeps the results in `secateur/evaluation.json`. New
    results replace earlier ones of the same protocol. Other results stay.

    Args:
        model: hub id, folder, GGUF file or named sample; or a loaded causal language model, which
            stays on its device.
        dense: The dense model, likewise. Adds divergence, differences and retention. [none]
        tokenizer: of a loaded model. [the one at the place the model came from]
        prompts: the texts that the model continues.
        progress: receives every step.
        text: Text for the perplexity: file, named text or hub data set; may be repeated.
            [wikitext2, or the text that a sample brings, if nothing else is measured]
        tasks: Tasks of lm-eval, separated by commas: hellaswag,piqa. [none]
        generation: Continue a few prompts, and count repetitions in the texts. [off]
        kinds: Also compare on prose, code, chat and lists, which the dense model writes: how often
            it would accept the tokens of this model as its draft. [off]
        task_data: Folder of tasks in lm-eval's YAML files, whose data may be local. [lm-eval's own]
        sequence_length: Tokens per window. [2048, or the model's length if that is shorter]
        windows: Evaluate only this many windows of each text, from its start. [all]
        limit: Evaluate only this many items of each task, from its start. [all]
        shots: Number of solved examples before each question. [the task's own, mostly 0]
        trust_remote_code: Allow Python code that comes with the checkpoint. [off]
        device: Where to compute: auto, cpu, cuda or cuda:N. [auto]
        max_memory: Largest peak memory, such as 6GiB: of the GPU if the run computes there, else of
            this process. A run that needs more does not start. [4/5 of the free memory]
        output: JSON file for the results of this call. An existing file is replaced. [none]

    Returns:
        The results of this call.

    Raises:
        SecateurError: what, where, and what to do.
    """

def export(
    model: str | Path,
    *,
    progress: Progress | None = None,
    to: Literal["gguf", "compressed-tensors", "onnx", "openvino"] | None = None,
    type: str | None = None,
    draft_of: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool | None = None,
) -> ExportResult:
    """Write a model for another engine, with its zeros.

    The model is checked first: one that the engine would compute differently is refused. The zeros
    of every matrix are counted before and after, and all of them must stay unless the type has no
    exact zeros.

    Args:
        model: Folder (compressed or not), hub id, GGUF file or named sample.
        progress: receives every step.
        to: The target: gguf, compressed-tensors, onnx, openvino. [gguf]
        type: How matrices are stored. gguf: q8_0, f16, bf16, f32, q5_0, q4_0, stored (as the folder
            has them), and with the extra llamacpp its own mixes: q6_k, q5_k_m, q4_k_m, iq4_xs,
            q3_k_m, q2_k and others, most of which lose exact zeros. compressed-tensors: w8a8,
            w4a16, w8a16. onnx: fp32, int8, int4. openvino: q8_0, f16, q4_0. [the first that the
            target names]
        draft_of: The parent of this draft. The export is refused unless both have the same
            tokenizer and as many tokens, which every engine asks of a draft model. [none]
        output: Folder for the new model. It must not exist. [required]
        overwrite: Replace an existing output folder. [off]

    Raises:
        SecateurError: what, where, and what to do.
    """

@overload
def fit(
    model: str | Path,
    *,
    dry_run: Literal[True],
    **options: Any,
) -> FitPlanResult: ...
@overload
def fit(
    model: str | Path,
    *,
    progress: Progress | None = None,
    max_size: int | str | None = None,
    max_inference_memory: int | str | None = None,
    context_length: int | None = None,
    decode_speedup: float | None = None,
    max_loss_increase: float | None = None,
    structure: bool | None = None,
    vocabulary: str | Path | None = None,
    target: Literal["cpu", "llama.cpp"] | None = None,
    like: str | Path | None = None,
    effort: Literal["fast", "balanced", "thorough", "best"] | None = None,
    heal_tokens: int | None = None,
    minutes: float | None = None,
    task_data: str | Path | None = None,
    calibration: str | Path | Iterable[str] | None = None,
    field: str | None = None,
    windows: int | None = None,
    sequence_length: int | None = None,
    seed: int | None = None,
    packing: Literal["concatenate", "random-crop"] | None = None,
    trust_remote_code: bool | None = None,
    device: str | None = None,
    max_memory: int | str | None = None,
    output: str | Path | None = None,
    must_keep: Sequence[str] | None = None,
    must_keep_items: int | None = None,
    activations: Literal["auto", "gpu", "memory", "disk"] | None = None,
    micro_batch_tokens: int | None = None,
    overwrite: bool | None = None,
    resume: bool | None = None,
    restart: bool | None = None,
    dry_run: Literal[False] | None = None,
) -> FitResult:
    """Find the best compressed model within a budget, and make it.

    Every linear may stay as it is, be rounded to 8, 4, 3 or 2 bits, be pruned to 30 to 70 %, or
    both; embedding and head are rounded to 8, 4 or 3 bits. One survey of the model predicts what
    each of these loses. The best choices are made, healed and measured.

    Args:
        model: Folder, hub id, GGUF file or named sample.
        progress: receives every step.
        max_size: Largest size of the weight files, such as 90MiB or 4GB. The result is the best one
            found that fits. [any]
        max_inference_memory: Most memory of a process that runs the result: weights, KV cache of
            --context-length, and working memory. [any]
        context_length: Tokens of prompt and answer together, for --max-inference-memory. [2048]
        decode_speedup: How many times as fast as dense int8 the result decodes at least, on this
            machine, one sequence at a time. [any]
        max_loss_increase: Most that the loss of the next token may rise, in nats. Without a size,
            the result is the smallest one found within it. [any]
        structure: Also try fewer experts and fewer FFN neurons in more bits. [off]
        vocabulary: First remove the tokens that this text never needs; what they take is spent on
            the rest. [all tokens stay]
        target: What runs the result; only what it can store and speed up is used: cpu (our formats
            and kernels), or llama.cpp (a GGUF file beside the packed model). [cpu]
        like: A GGUF file of the same model, by whatever converter and quantizer. The result is this
            file with better codes in the same types, or an error where they are not better. [none]
        effort: The preset that prunes, and that decides how much is healed. [balanced]
        heal_tokens: Tokens of the calibration text on which the best models learn from the dense
            one, on their own grids and masks. 0: none. By --effort: fast 0, balanced 65,536,
            thorough 131,072, best 262,144. [by --effort]
        minutes: Time budget in minutes. If it runs short, candidates and healing are left out; the
            result says what. [no limit]
        task_data: Folder of tasks in lm-eval's YAML files, whose data may be local. [lm-eval's own]
        calibration: Calibration text: JSONL or text file, folder of texts, hub data set, named
            text, or safetensors file of windows. Or several with weights:
            code.jsonl=2,math.jsonl=1. [c4, or the text that a sample brings]
        field: The field of a JSONL line that holds the text. Lines without it may hold
            conversations (`messages`, `conversations`), which the model's chat template writes.
            [text]
        windows: Number of calibration windows. [128]
        sequence_length: Tokens per window. [2048, or the model's length if that is shorter]
        seed: Seed that chooses the windows. [0]
        packing: concatenate joins all documents and cuts them into windows. random-crop takes each
            window from a random place of a random document, as the papers do. [concatenate]
        trust_remote_code: Allow Python code that comes with the checkpoint. [off]
        device: Where to compute: auto, cpu, cuda or cuda:N. [auto]
        max_memory: Largest peak memory, such as 6GiB: of the GPU if the run computes there, else of
            this process. A run that needs more does not start. [4/5 of the free memory]
        output: Folder for the new model. It must not exist. [required]
        must_keep: Publish the result only if it keeps this of MODEL, separated by commas:
            TASK:SHARE of the score in a task of lm-eval (gsm8k:0.97), loops:SHARE of texts that
            begin to repeat (loops:0.01), divergence@TEXT:NATS and loss@TEXT:NATS per token of a
            text (divergence@code.jsonl:0.1). Otherwise the exit code is 3, and --resume with other
            bounds needs no work again. [none]
        must_keep_items: Judge on this many items of each task, windows of each text, and prompts,
            from the start. [all items of a task, 64 windows of a text]
        activations: Where to store hidden states between layers: memory of the GPU, of the host, or
            disk; auto uses the first in which they fit. [auto]
        micro_batch_tokens: Tokens in one forward of a layer. [2048]
        overwrite: Replace an existing output folder. [off]
        resume: Resume a stopped run, or start if there is none. A finished one is shown. [off]
        restart: Discard a stopped run and start again. [off]
        dry_run: Check the options and show what the run would need. Reads no weights, and writes
            nothing. [off]

    Raises:
        SecateurError: what, where, and what to do.
    """

def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = ...,
    json_schema: str | Path | Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = ...,
    system: str | None = None,
    chat: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] | None = None,
    kv_cache: Literal["bf16", "int8"] | None = None,
    draft: str | None = None,
    trust_remote_code: bool | None = None,
    device: str | None = None,
) -> GenerateResult:
    """Continue a prompt with the fastest loop that the model and the device allow.

    Args:
        model: folder (compressed or not), hub id, GGUF file or named sample.
        prompt: the text to continue; with a chat template the message to answer.
        max_new_tokens: maximum number of new tokens.
        json_schema: a JSON schema that the text follows, or its file; needs the extra `structured`.
        tell: receives the text piece by piece.
        system: System message at the start of the conversation. [none]
        chat: Use the tokenizer's chat template. [on, if it has one]
        temperature: 0 always takes the most likely token; higher values sample. [the model's
            generation_config.json, else 0]
        top_k: Sample only from this many most likely tokens; 0 for all. [the model's
            generation_config.json, else all]
        top_p: Sample only from the most likely tokens that add up to this probability. [the model's
            generation_config.json, else 1]
        min_p: Sample only from tokens of at least this share of the largest probability. [the
            model's generation_config.json, else 0]
        repetition_penalty: Above 1: tokens of the prompt and the text become less likely. Divides
            positive logits, multiplies negative ones. [the model's generation_config.json, else 1]
        presence_penalty: Subtract this from the logits of tokens that the text has. [0]
        frequency_penalty: Subtract this once for each time that the text has the token. [0]
        seed: Seed for sampling. [0]
        stop: Stop before the model writes this text; may be repeated. [none]
        kv_cache: Type of the KV cache. int8 takes half the memory of bf16. [bf16, or float32 if the
            model is]
        draft: A smaller model with the same vocabulary, or a head of this model: `secateur draft`
            makes both. It proposes tokens, and the model checks several in one call: faster, and
            with the same output (speculative decoding). [none]
        trust_remote_code: Allow Python code that comes with the checkpoint. [off]
        device: Where to compute: auto, cpu, cuda or cuda:N. [auto]

    Raises:
        SecateurError: what, where, and what to do.
    """

def import_model(
    model: str | Path,
    *,
    progress: Progress | None = None,
    masks: str | Path | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool | None = None,
    output: str | Path | None = None,
    overwrite: bool | None = None,
) -> ImportResult:
    """Make an ordinary folder from what another tool wrote: dense safetensors with its zeros.

    The kind of source is recognised. The values are those that the source means, in the dtype of
    the model; where that dtype cannot hold them exactly, they are rounded once, and counted. The
    written files are read again: sparsity and pattern of every matrix are in the result.

    Args:
        model: Folder or hub id of a model with zeros: plain safetensors, compressed-tensors, or
            torch.nn.utils.prune; a dense model with --masks.
        progress: receives every step.
        masks: Safetensors file of masks by the names of tensors, True = kept. They are applied to
            the model. [none]
        adapter: Folder of an adapter that peft trained on the model. It is merged, and the zeros of
            the model stay zero. [none]
        trust_remote_code: Allow Python code that comes with the checkpoint. [off]
        output: Folder for the new model. It must not exist. [required]
        overwrite: Replace an existing output folder. [off]

    Raises:
        SecateurError: what, where, and what to do.
    """

@overload
def prune(
    model: str | Path | nn.Module,
    *,
    dry_run: Literal[True],
    **options: Any,
) -> PlanResult: ...
@overload
def prune(
    model: str | Path | nn.Module,
    *,
    method: str | Method | None = None,
    calibration: str | Path | Iterable[str] | Tensor | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    overrides: Mapping[str, float] | None = None,
    effort: Literal["fast", "balanced", "thorough", "best"] | None = None,
    method_overrides: Mapping[
        str,
        dict[
            str,
            int
            | float
            | Literal[
                "q2_k",
                "q3_k",
                "q4_k",
                "q5_k",
                "q6_k",
                "iq4_nl",
                "iq4_xs",
                "q4_0",
                "q4_1",
                "q5_0",
                "q5_1",
                "q8_0",
            ],
        ],
    ]
    | None = None,
    scope: Literal["row", "layer", "global"] | None = None,
    allocation: str | None = None,
    on_collapse: Literal["stop", "warn"] | None = None,
    task_data: str | Path | None = None,
    field: str | None = None,
    windows: int | None = None,
    sequence_length: int | None = None,
    seed: int | None = None,
    packing: Literal["concatenate", "random-crop"] | None = None,
    generated_windows: int | None = None,
    tune_passes: int | None = None,
    distill_epochs: int | None = None,
    distill_tokens: int | None = None,
    distill_teacher: str | Path | None = None,
    distill_learning_rate: float | None = None,
    distill_next_token: float | None = None,
    distill_hidden: float | None = None,
    distill_sweep_windows: int | None = None,
    processes: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    trust_remote_code: bool | None = None,
    device: str | None = None,
    max_memory: int | str | None = None,
    output: str | Path | None = None,
    compress: Literal[
        "auto",
        "keep",
        "bfloat16",
        "float16",
        "float32",
        "int8",
        "int4",
        "int3",
        "int2",
        "q2_k",
        "q3_k",
        "q4_k",
        "q5_k",
        "q6_k",
        "iq4_nl",
        "iq4_xs",
        "q4_0",
        "q4_1",
        "q5_0",
        "q5_1",
        "q8_0",
    ]
    | None = None,
    keep_format: bool | None = None,
    must_keep: Sequence[str] | None = None,
    must_keep_items: int | None = None,
    score: str | None = None,
    solver: str | None = None,
    refine: str | None = None,
    method_parameters: Mapping[
        str,
        int
        | float
        | Literal[
            "q2_k",
            "q3_k",
            "q4_k",
            "q5_k",
            "q6_k",
            "iq4_nl",
            "iq4_xs",
            "q4_0",
            "q4_1",
            "q5_0",
            "q5_1",
            "q8_0",
        ],
    ]
    | None = None,
    asymmetric_damping: float | None = None,
    sequential: Literal["group", "layer"] | None = None,
    asymmetric: bool | None = None,
    fast_matmuls: bool | None = None,
    activations: Literal["auto", "gpu", "memory", "disk"] | None = None,
    micro_batch_tokens: int | None = None,
    overwrite: bool | None = None,
    resume: bool | None = None,
    restart: bool | None = None,
    dry_run: Literal[False] | None = None,
) -> PruneResult:
    """Prune a model: a checkpoint into a new folder, or a loaded module in place.

    Args:
        model: hub id, folder, GGUF file or named sample; or a loaded causal language model.
        method: A method by name (`secateur methods` lists them), or what `compose` returned.
        calibration: Calibration text, as a file, folder, hub data set or named text, or as several
            texts; for a loaded model also token windows [windows, sequence_length]. [c4, or
            the text that a sample brings]
        tokenizer: of a loaded model, to read text. [the one at the place the model came from]
        progress: receives every step.
        sparsity: Fraction of weights that become zero, 0 to 1. [the pattern's own]
        pattern: Which zeros are allowed: unstructured, N:M (N kept of M), or blocks as
            ROWSxCOLUMNS. [unstructured]
        include: Names of the linear layers to prune. [*]
        exclude: Names of linear layers that stay dense. [none]
        overrides: Own sparsity for some linear layers; 0 keeps them dense. [none]
        effort: Preset: fast, balanced, thorough or best. It fills in the options that you do not
            give. [balanced, if no method is given]
        method_overrides: Own method parameters for some linear layers, such as {'*.down_proj':
            {bits: 8}}. [none]
        scope: The set of weights that compete: row, layer or global. [as in the method's paper]
        allocation: How to divide the sparsity among the linear layers: uniform, owl,
            layer-sensitivity, divergence, global or search. [the preset's]
        on_collapse: What to do if a linear layer lost most of its output by pruning: stop or warn.
            [warn]
        task_data: Folder of tasks in lm-eval's YAML files, whose data may be local. [lm-eval's own]
        field: The field of a JSONL line that holds the text. Lines without it may hold
            conversations (`messages`, `conversations`), which the model's chat template writes.
            [text]
        windows: Number of calibration windows. [128]
        sequence_length: Tokens per window. [2048, or the model's length if that is shorter]
        seed: Seed that chooses the windows. [0]
        packing: concatenate joins all documents and cuts them into windows. random-crop takes each
            window from a random place of a random document, as the papers do. [concatenate]
        generated_windows: Extra calibration windows that the dense model generates. [0]
        tune_passes: Tune each layer after pruning, in this many passes over the calibration
            windows, to reproduce the dense layer's outputs. 0: no tuning. [0]
        distill_epochs: Train the new model to match the dense model, in this many epochs over the
            calibration windows. 0: no distillation. [the preset's]
        distill_tokens: An epoch of the distillation reads at least this many tokens: the
            calibration windows, then more windows of the same text. 0: the calibration windows
            alone. [the preset's]
        distill_teacher: Model to learn from, such as the one that was pruned: hub id, folder or
            named sample. It may have more or wider layers, and has the same vocabulary. [the
            source]
        distill_learning_rate: Highest learning rate of the distillation. The default is 0.25 /
            hidden size · √(tokens in a window / 2048), or less if that is better in short trials.
            [chosen by short trials]
        distill_next_token: Share of the next-token loss, 0 to 1; the rest is the divergence from
            the dense model. [the preset's]
        distill_hidden: Weight of the distance between the outputs of the last decoder layer in both
            models; 0: none. [the preset's]
        distill_sweep_windows: Distill with one decoder layer in memory, in sweeps over this many
            windows: all layers forward, then all layers backward. 0: both whole models in memory.
            [0 if both models fit, else 16]
        processes: With --dry-run: plan one of so many processes on this machine. torchrun starts
            them. [one]
        dtype: Type for the weights of a GGUF file. [float32; other sources keep theirs]
        trust_remote_code: Allow Python code that comes with the checkpoint. [off]
        device: Where to compute: auto, cpu, cuda or cuda:N. [auto]
        max_memory: Largest peak memory, such as 6GiB: of the GPU if the run computes there, else of
            this process. A run that needs more does not start. [4/5 of the free memory]
        output: Folder for the new model. It must not exist. [required]
        compress: Also compress the result like `secateur compress --values VALUES`: auto, keep,
            bfloat16, float16, float32, int8, int4, int3, int2, or a type of llama.cpp such as q4_k.
            [not compressed]
        keep_format: Write a source in FP8, MXFP4 or integers back in its own format, with the
            scales that it has, instead of in bfloat16. Zeros stay zeros; weights that the method
            changes are rounded. [off]
        must_keep: Publish the result only if it keeps this of MODEL, separated by commas:
            TASK:SHARE of the score in a task of lm-eval (gsm8k:0.97), loops:SHARE of texts that
            begin to repeat (loops:0.01), divergence@TEXT:NATS and loss@TEXT:NATS per token of a
            text (divergence@code.jsonl:0.1). Otherwise the exit code is 3, and --resume with other
            bounds needs no work again. [none]
        must_keep_items: Judge on this many items of each task, windows of each text, and prompts,
            from the start. [all items of a task, 64 windows of a text]
        score: Score that rates the weights, to compose a method of your own instead of naming one.
            [none]
        solver: Solver that adjusts the kept weights, to compose a method of your own. [none]
        refine: Improve the mask before solving: swaps. [none]
        method_parameters: Parameters of the score, the solver and the refinement. [the preset's]
        asymmetric_damping: Damping of the asymmetric fit towards the dense weights. [0.2]
        sequential: group: each group of linear layers sees inputs from the pruned groups before it.
            layer: all linear layers of a layer see inputs from the unpruned layer, as in the
            papers. [group]
        asymmetric: asymmetric fits pruned linear layers to the dense model's outputs. symmetric
            fits each linear layer to its own outputs on the same inputs. [the preset's]
        fast_matmuls: Calibrate in bfloat16 on processors where this is faster. [the preset's]
        activations: Where to store hidden states between layers: memory of the GPU, of the host, or
            disk; auto uses the first in which they fit. [auto]
        micro_batch_tokens: Tokens in one forward of a layer. [2048]
        overwrite: Replace an existing output folder. [off]
        resume: Resume a stopped run, or start if there is none. A finished one is shown. [off]
        restart: Discard a stopped run and start again. [off]
        dry_run: Check the options and show what the run would need. Reads no weights, and writes
            nothing. [off]

    Returns:
        The result of the run; with `dry_run` its plan.

    Raises:
        SecateurError: what, where, and what to do.
    """

def push(
    model: str | Path,
    repo: str,
    *,
    progress: Progress | None = None,
    trust_remote_code: bool | None = None,
    public: bool | None = None,
    branch: str | None = None,
    base_model: str | None = None,
    dry_run: bool | None = None,
) -> PushResult:
    """Publish a model folder on the hub, with a card that has its results and their protocols.

    The zeros are counted first and compared with the records. A folder that lost some, that is
    incomplete, or that holds keys or tokens is refused. The repository is private unless `public`.

    Args:
        model: Folder of the model.
        repo: Repository on the hub, OWNER/NAME. It is created if there is none.
        progress: receives every step.
        trust_remote_code: Allow Python code that comes with the checkpoint. [off]
        public: Make the repository public. Without this it is private. [off]
        branch: Branch of the repository; it is created if there is none. [main]
        base_model: Base model for the card, OWNER/NAME on the hub. [the one that the card names]
        dry_run: Check everything and show files and card. Nothing is sent. [off]

    Raises:
        SecateurError: what, where, and what to do.
    """

@overload
def structure(
    model: str | Path,
    *,
    dry_run: Literal[True],
    **options: Any,
) -> CutFileResult | CutPlanResult: ...
@overload
def structure(
    model: str | Path,
    *,
    progress: Progress | None = None,
    keep_layers: int | float | None = None,
    experts: int | float | None = None,
    experts_list: str | Path | None = None,
    layers_list: str | None = None,
    hidden_size: int | float | None = None,
    kv_groups: int | float | None = None,
    query_heads: int | float | None = None,
    ffn: int | float | None = None,
    vocabulary: str | Path | None = None,
    vocabulary_size: int | float | str | None = None,
    keep_parameters: float | None = None,
    max_size: int | str | None = None,
    decode_latency: float | None = None,
    whole_first: int | None = None,
    whole_last: int | None = None,
    multiple: int | None = None,
    effort: Literal["fast", "balanced", "thorough", "best"] | None = None,
    allocation: str | None = None,
    experts_by: Literal["reap", "divergence", "frequency", "aimer", "imatrix", "random"]
    | None = None,
    imatrix: str | Path | None = None,
    experts_scope: Literal["layer", "global"] | None = None,
    depth_by: Literal["influence", "angular", "greedy"] | None = None,
    task_data: str | Path | None = None,
    calibration: str | Path | Iterable[str] | None = None,
    field: str | None = None,
    windows: int | None = None,
    sequence_length: int | None = None,
    seed: int | None = None,
    packing: Literal["concatenate", "random-crop"] | None = None,
    generated_windows: int | None = None,
    distill_epochs: int | None = None,
    distill_tokens: int | None = None,
    distill_teacher: str | Path | None = None,
    distill_learning_rate: float | None = None,
    distill_next_token: float | None = None,
    distill_hidden: float | None = None,
    distill_sweep_windows: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    trust_remote_code: bool | None = None,
    device: str | None = None,
    max_memory: int | str | None = None,
    output: str | Path | None = None,
    must_keep: Sequence[str] | None = None,
    must_keep_items: int | None = None,
    score: str | None = None,
    solver: str | None = None,
    method_parameters: Mapping[str, int | float] | None = None,
    asymmetric: bool | None = None,
    fast_matmuls: bool | None = None,
    activations: Literal["auto", "gpu", "memory", "disk"] | None = None,
    micro_batch_tokens: int | None = None,
    overwrite: bool | None = None,
    resume: bool | None = None,
    restart: bool | None = None,
    dry_run: Literal[False] | None = None,
) -> StructureResult:
    """Cut structure out of a checkpoint, and write a new, smaller one.

    Args:
        model: Hub id, folder, GGUF file or named sample.
        progress: receives every step.
        keep_layers: Decoder layers to keep: a number, or a fraction such as 0.8. [all]
        experts: Experts to keep in each layer: a number or a fraction. [all]
        experts_list: Experts to keep, by number: a JSON file such as {"0": [1, 2, 5], "1": [0, 3]},
            by layer. [chosen by a score]
        layers_list: Decoder layers to keep, by number, such as 0-11,14,16-31. For a GGUF file as
            output. [chosen]
        hidden_size: Channels of the residual stream to keep: a number or a fraction. [all]
        kv_groups: KV groups (with their query heads) to keep in each layer: a number or a fraction.
            [all]
        query_heads: Query heads to keep in each KV group: a number or a fraction. The KV cache
            keeps its size. [all]
        ffn: FFN neurons to keep in each layer: a number or a fraction. In a mixture, neurons of
            each expert; a shared expert and dense layers keep the same share. [all]
        vocabulary: Remove the tokens that this text never needs from tokenizer, embedding and head:
            JSONL or text file, folder of texts, hub data set or named text. Or several with
            weights: de.jsonl=2,code.jsonl=1. [all tokens stay]
        vocabulary_size: Keep the most frequent tokens of the text; without --vocabulary, of the
            calibration text: at most a number (16384), as many as the weight files may have bytes
            for (2GiB), or so many that this share of the text's tokens is lost (0.01). [all that
            the text has]
        keep_parameters: Fraction of the decoder's parameters to keep. Experts, KV groups and FFN
            neurons are cut until it is reached. [all]
        max_size: Largest size of the weight files, such as 90MiB. Experts, KV groups and FFN
            neurons are cut until they fit. [no limit]
        decode_latency: Largest time per token, as a fraction of the uncut model's, measured on this
            machine in transformers at batch 1. KV groups and FFN neurons are cut until it is met.
            [no limit]
        whole_first: Number of first decoder layers that keep all heads and neurons. [0]
        whole_last: Number of last decoder layers that keep all heads and neurons. [0]
        multiple: Round the FFN width, and the number of tokens, to a multiple of this number. [1]
        effort: Preset: fast, balanced, thorough or best. It fills in the options that you do not
            give. [balanced, if no score is given]
        allocation: How to divide the cut among the layers: uniform, owl, layer-sensitivity,
            divergence, global or search. [uniform]
        experts_by: How to select experts: by REAP; by the divergence that their removal makes,
            which takes a backward pass; by how often they are chosen; by their weights alone
            (aimer); by an importance matrix; or at random. [reap]
        imatrix: The importance matrix of a GGUF file, by llama.cpp: .gguf or .dat. [none]
        experts_scope: Where experts compete: within their layer, or in the whole model, so that
            layers keep different numbers. [layer]
        depth_by: How to select layers: by block influence, angular distance, or greedy removal.
            [influence]
        task_data: Folder of tasks in lm-eval's YAML files, whose data may be local. [lm-eval's own]
        calibration: Calibration text: JSONL or text file, folder of texts, hub data set, named
            text, or safetensors file of windows. Or several with weights:
            code.jsonl=2,math.jsonl=1. [c4, or the text that a sample brings]
        field: The field of a JSONL line that holds the text. Lines without it may hold
            conversations (`messages`, `conversations`), which the model's chat template writes.
            [text]
        windows: Number of calibration windows. [128]
        sequence_length: Tokens per window. [2048, or the model's length if that is shorter]
        seed: Seed that chooses the windows. [0]
        packing: concatenate joins all documents and cuts them into windows. random-crop takes each
            window from a random place of a random document, as the papers do. [concatenate]
        generated_windows: Extra calibration windows that the dense model generates. [the preset's]
        distill_epochs: Train the new model to match the dense model, in this many epochs over the
            calibration windows. 0: no distillation. [the preset's]
        distill_tokens: An epoch of the distillation reads at least this many tokens: the
            calibration windows, then more windows of the same text. 0: the calibration windows
            alone. [the preset's]
        distill_teacher: Model to learn from, such as the one that was pruned: hub id, folder or
            named sample. It may have more or wider layers, and has the same vocabulary. [the
            source]
        distill_learning_rate: Highest learning rate of the distillation. The default is 0.25 /
            hidden size · √(tokens in a window / 2048), or less if that is better in short trials.
            [chosen by short trials]
        distill_next_token: Share of the next-token loss, 0 to 1; the rest is the divergence from
            the dense model. [the preset's]
        distill_hidden: Weight of the distance between the outputs of the last decoder layer in both
            models; 0: none. [0]
        distill_sweep_windows: Distill with one decoder layer in memory, in sweeps over this many
            windows: all layers forward, then all layers backward. 0: both whole models in memory.
            [0 if both models fit, else 16]
        dtype: Type for the weights of a GGUF file. [float32; other sources keep theirs]
        trust_remote_code: Allow Python code that comes with the checkpoint. [off]
        device: Where to compute: auto, cpu, cuda or cuda:N. [auto]
        max_memory: Largest peak memory, such as 6GiB: of the GPU if the run computes there, else of
            this process. A run that needs more does not start. [4/5 of the free memory]
        output: Folder for the new model. It must not exist. If MODEL is a GGUF file, it may be one
            too: the file itself is cut, and its bytes are copied. [required]
        must_keep: Publish the result only if it keeps this of MODEL, separated by commas:
            TASK:SHARE of the score in a task of lm-eval (gsm8k:0.97), loops:SHARE of texts that
            begin to repeat (loops:0.01), divergence@TEXT:NATS and loss@TEXT:NATS per token of a
            text (divergence@code.jsonl:0.1). Otherwise the exit code is 3, and --resume with other
            bounds needs no work again. [none]
        must_keep_items: Judge on this many items of each task, windows of each text, and prompts,
            from the start. [all items of a task, 64 windows of a text]
        score: Score that selects the units to remove. [the preset's]
        solver: Solver that adjusts the weights that read the removed units. [the preset's]
        method_parameters: Parameters of the score and the solver. [the preset's]
        asymmetric: asymmetric fits pruned linear layers to the dense model's outputs. symmetric
            fits each linear layer to its own outputs on the same inputs. [the preset's]
        fast_matmuls: Calibrate in bfloat16 on processors where this is faster. [the preset's]
        activations: Where to store hidden states between layers: memory of the GPU, of the host, or
            disk; auto uses the first in which they fit. [auto]
        micro_batch_tokens: Tokens in one forward of a layer. [2048]
        overwrite: Replace an existing output folder. [off]
        resume: Resume a stopped run, or start if there is none. A finished one is shown. [off]
        restart: Discard a stopped run and start again. [off]
        dry_run: Check the options and show what the run would need. Reads no weights, and writes
            nothing. [off]

    Raises:
        SecateurError: what, where, and what to do.
    """

def sweep(
    model: str | Path,
    *,
    progress: Progress | None = None,
    methods: Sequence[str] | None = None,
    sparsities: Sequence[float] | None = None,
    patterns: Sequence[str] | None = None,
    text: Sequence[str | Path] | None = None,
    text_sequence_length: int | None = None,
    text_windows: int | None = None,
    calibration: str | Path | Iterable[str] | None = None,
    field: str | None = None,
    windows: int | None = None,
    sequence_length: int | None = None,
    seed: int | None = None,
    packing: Literal["concatenate", "random-crop"] | None = None,
    generated_windows: int | None = None,
    trust_remote_code: bool | None = None,
    device: str | None = None,
    max_memory: int | str | None = None,
    output: str | Path | None = None,
    activations: Literal["auto", "gpu", "memory", "disk"] | None = None,
    micro_batch_tokens: int | None = None,
    overwrite: bool | None = None,
    resume: bool | None = None,
    restart: bool | None = None,
) -> SweepResult:
    """Prune and evaluate a model with several methods at several sparsities.

    A point that fails is recorded as a failure, and the sweep continues. The result has a table, a
    plot, and the notes of every point.

    Args:
        model: Hub id, folder, GGUF file or named sample.
        progress: receives every step.
        methods: Methods, scores or presets (fast, balanced, thorough, best), separated by commas.
            [none]
        sparsities: Fractions of zeros, separated by commas, such as 0.3,0.5,0.7. [none]
        patterns: Patterns to try as well, separated by commas, such as 2:4,4:8. [none]
        text: Text to evaluate on; may be repeated. [wikitext2, or the text that a sample brings]
        text_sequence_length: Tokens per evaluation window. [2048, or the model's length if that is
            shorter]
        text_windows: Evaluate only this many windows of each text, from its start. [all]
        calibration: Calibration text: JSONL or text file, folder of texts, hub data set, named
            text, or safetensors file of windows. Or several with weights:
            code.jsonl=2,math.jsonl=1. [c4, or the text that a sample brings]
        field: The field of a JSONL line that holds the text. Lines without it may hold
            conversations (`messages`, `conversations`), which the model's chat template writes.
            [text]
        windows: Number of calibration windows. [128]
        sequence_length: Tokens per window. [2048, or the model's length if that is shorter]
        seed: Seed that chooses the windows. [0]
        packing: concatenate joins all documents and cuts them into windows. random-crop takes each
            window from a random place of a random document, as the papers do. [concatenate]
        generated_windows: Extra calibration windows that the dense model generates. [0]
        trust_remote_code: Allow Python code that comes with the checkpoint. [off]
        device: Where to compute: auto, cpu, cuda or cuda:N. [auto]
        max_memory: Largest peak memory, such as 6GiB: of the GPU if the run computes there, else of
            this process. A run that needs more does not start. [4/5 of the free memory]
        output: Folder for the new model. It must not exist. [required]
        activations: Where to store hidden states between layers: memory of the GPU, of the host, or
            disk; auto uses the first in which they fit. [auto]
        micro_batch_tokens: Tokens in one forward of a layer. [2048]
        overwrite: Replace an existing output folder. [off]
        resume: Resume a stopped run, or start if there is none. A finished one is shown. [off]
        restart: Discard a stopped run and start again. [off]

    Raises:
        SecateurError: what, where, and what to do.
    """

@overload
def train(
    model: str | Path,
    *,
    dry_run: Literal[True],
    **options: Any,
) -> TrainPlanResult: ...
@overload
def train(
    model: str | Path,
    *,
    progress: Progress | None = None,
    text: Sequence[str | Path] | None = None,
    field: str | None = None,
    answers_only: bool | None = None,
    sequence_length: int | None = None,
    windows: int | None = None,
    mask: str | Path | None = None,
    validation_text: str | Path | None = None,
    validation_windows: int | None = None,
    seed: int | None = None,
    teacher: str | Path | None = None,
    kind: Literal["forward", "reverse", "total_variation"] | None = None,
    temperature: float | None = None,
    next_token: float | None = None,
    hidden_weight: float | None = None,
    top_k: int | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    epochs: float | None = None,
    batch: int | None = None,
    learning_rate: float | None = None,
    warm_up: float | None = None,
    clip: float | None = None,
    optimizer: str | None = None,
    lora: int | Mapping[str, Any] | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float | None = None,
    lora_targets: Sequence[str] | None = None,
    lora_exclude: Sequence[str] | None = None,
    gradual: float | str | Mapping[str, Any] | None = None,
    iterative: float | str | Mapping[str, Any] | None = None,
    validations: int | None = None,
    micro_batch_windows: int | None = None,
    gradient_checkpointing: bool | None = None,
    trust_remote_code: bool | None = None,
    device: str | None = None,
    max_memory: int | str | None = None,
    output: str | Path | None = None,
    save_minutes: float | None = None,
    optimizer_options: Mapping[str, bool | int | float | list[float]] | None = None,
    rates: Mapping[str, float] | None = None,
    fast_matmuls: bool | None = None,
    overwrite: bool | None = None,
    resume: bool | None = None,
    restart: bool | None = None,
    dry_run: Literal[False] | None = None,
) -> TrainResult:
    """Train a checkpoint into a new folder, with its zeros held at every step.

    It learns from text; with a `teacher` it learns that model's predictions for the text. With
    several processes, only the first one writes, and all return the result.

    Args:
        model: Pruned, cut or dense model: hub id, folder or named sample.
        progress: receives every step.
        text: Training text: file, folder, hub data set or named text. May be repeated; each text
            then gives equally many windows. [c4, or the text that a sample brings]
        field: The field of a JSONL line that holds the text. Lines without it may hold
            conversations (`messages`, `conversations`) or pairs of `prompt` and `completion`.
            [text]
        answers_only: Of conversations, learn only what the assistant writes, and of pairs the
            completion. [on, where there are answers]
        sequence_length: Tokens per window. [512, or the model's length if that is shorter]
        windows: Largest number of training windows. A longer run repeats them. [4096]
        mask: Masks to hold: a file of masks, or the folder of a pruned model. [the model's own
            zeros]
        validation_text: Validation text. [held-out windows of the training text]
        validation_windows: Number of validation windows; 0: no validation. [16]
        seed: Seed that chooses the windows and their order. [0]
        teacher: Model to learn from, such as the one that was pruned: hub id, folder or named
            sample. [none: learn from the text]
        kind: Divergence to minimise: forward is KL(teacher ‖ student), reverse is KL(student ‖
            teacher); total_variation is what a draft is refused by. [forward]
        temperature: Temperature of both models; gradients are scaled by its square. [1]
        next_token: Share of the next-token loss, 0 to 1; the rest is the divergence. [0]
        hidden_weight: Weight of the hidden-state loss; 0: none. [0]
        top_k: Before the training, store this many of the teacher's most likely tokens for each
            position, and release the teacher. [all, while training]
        steps: Optimizer steps. [as many as the epochs need]
        minutes: Minutes to train, instead of steps. [as long as the steps take]
        epochs: Epochs over the windows, if neither steps nor minutes are given. [1]
        batch: Windows per optimizer step. [4, or the next multiple of the number of processes]
        learning_rate: Highest learning rate. [0.25 / hidden size · √(tokens in a step / 2048)]
        warm_up: Share of the run in which the learning rate rises. [0.05]
        clip: Largest norm of the gradient; larger ones are clipped. 0: no clip. [1]
        optimizer: A class of torch.optim. [AdamW]
        lora: Train low-rank adapters of this rank, and merge them at the end. Another --lora option
            alone means rank 16. [train all weights]
        lora_alpha: What an adapter adds is multiplied by alpha / rank. [2 · rank]
        lora_dropout: Dropout on the inputs of the adapters. [0]
        lora_targets: Names of the linear layers that get adapters, such as q_proj,v_proj. [*]
        lora_exclude: Names of linear layers that get none. [none]
        gradual: Prune gradually during training, up to this sparsity or N:M pattern. [the zeros
            stay as they are]
        iterative: Prune and train in rounds, up to this sparsity or N:M pattern. Each round trains
            for --steps. [the zeros stay as they are]
        validations: Number of validations during the run; one more comes before it. [10]
        micro_batch_windows: Windows in one forward. [about 2048 tokens]
        gradient_checkpointing: Compute layers again in the backward pass: a third slower, much less
            memory. [off]
        trust_remote_code: Allow Python code that comes with the checkpoint. [off]
        device: Where to compute: auto, cpu, cuda or cuda:N. [auto]
        max_memory: Largest peak memory, such as 6GiB: of the GPU if the run computes there, else of
            this process. A run that needs more does not start. [4/5 of the free memory]
        output: Folder for the new model. It must not exist. [required]
        save_minutes: Minutes between saves; a stopped run resumes from the last one. [5]
        optimizer_options: Other arguments of the optimizer, such as weight_decay. [none]
        rates: Learning rate of some parameters, as a factor of the rate; 0 freezes them. [none]
        fast_matmuls: Multiply in bfloat16 on processors where this is faster. [on]
        overwrite: Replace an existing output folder. [off]
        resume: Resume a stopped run, or start if there is none. A finished one is shown. [off]
        restart: Discard a stopped run and start again. [off]
        dry_run: Check the options and show what the run would need. Reads no weights, and writes
            nothing. [off]

    Raises:
        SecateurError: what, where, and what to do.
    """
