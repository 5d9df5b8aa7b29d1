"""One declaration of every option: sections give flags, keywords, help and errors."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest

import secateur
from secateur.cli.app import make_app
from secateur.errors import RecipeError
from secateur.recipes.keywords import public_function, recipe_of
from secateur.recipes.measure import EvaluateRecipe
from secateur.recipes.options import GROUPS, options_of, run_options_of
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_call, build_recipe, nested, read_flag, recipe_from_flags
from secateur.recipes.structure import StructureRecipe
from secateur.recipes.train import TrainRecipe
from secateur.recipes.verbs import VERBS, imported

DECLARED = list(VERBS.values())
IN_PYTHON = [verb for verb in DECLARED if verb.in_python]


@pytest.mark.parametrize("verb", DECLARED, ids=lambda verb: verb.name)
def test_every_option_has_a_sentence_a_default_and_a_name_of_its_own(verb) -> None:
    kind = imported(verb.recipe)
    options = [*options_of(kind), *run_options_of(kind)]
    names = [name for o in options for name in (o.name, o.flag.off, *o.flag.aliases) if name]
    assert len(names) == len({*names})
    for option in options:
        assert option.help[-1] == "."
        assert option.help[0].isupper() or option.help.split()[0] in option.about
        assert option.default
        assert option.group in GROUPS


@pytest.mark.parametrize("verb", IN_PYTHON, ids=lambda verb: verb.name)
def test_the_signature_has_every_option(verb) -> None:
    function = public_function(verb.name)
    assert inspect.unwrap(getattr(secateur, verb.python)) is function
    kind = imported(verb.recipe)
    parameters, docstring = dict(inspect.signature(function).parameters), function.__doc__
    for option in [*options_of(kind), *run_options_of(kind)]:
        assert option.name in parameters
        assert f"{option.name}: " in docstring
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert "**options" not in docstring


@pytest.mark.parametrize("verb", DECLARED, ids=lambda verb: verb.name)
def test_the_command_has_every_option_in_its_group(verb) -> None:
    kind = imported(verb.recipe)
    found = {}
    for argument in make_app()[verb.name].assemble_argument_collection():
        [group] = argument.parameter.group
        found |= dict.fromkeys((argument.field_info.name, *argument.names), group.name)
    for option in options_of(kind):
        if option.flag.hidden:
            continue
        flag = option.name if option.is_word else "--" + option.name.replace("_", "-")
        assert found[flag] == option.group


def test_headings_come_in_the_order_of_the_work(secateur) -> None:
    shown = secateur("prune", "--help").out
    places = [shown.index(f"─ {group} ─") for group in GROUPS if f"─ {group} ─" in shown]
    assert len(places) == 7
    assert places == sorted(places)


def run_python(script: str) -> None:
    """Run a script in a process of its own, which has imported nothing."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_the_function_of_a_verb_imports_no_other_verb() -> None:
    """Of these two the first needs least, so one process is enough for both."""
    run_python(
        "import sys, secateur\n"
        "allowed = {'runner'}\n"
        "for verb, module, others in (\n"
        f"    ('export', {module_of('export')!r}, ()),\n"
        f"    ('decompress', {module_of('decompress')!r}, ()),\n"
        "):\n"
        "    getattr(secateur, verb)\n"
        "    allowed |= {module, *others}\n"
        "    steps = {m for m in sys.modules if m.startswith('secateur.steps.')}\n"
        "    found = {m.rpartition('.')[2] for m in steps}\n"
        "    assert found <= allowed, (verb, found - allowed)\n"
    )


def module_of(verb: str) -> str:
    """The name of the module of a verb."""
    return VERBS[verb].step.partition(":")[0].rpartition(".")[2]


def test_flat_names_go_into_their_sections() -> None:
    flat = {"calibration": "a.txt", "windows": 4, "max_memory": "2GiB", "tune_passes": 3}
    values = nested(PruneRecipe, {**flat, "distillation": {"epochs": 1}})
    assert values == {
        "calibration": {"source": "a.txt", "windows": 4},
        "memory": {"max_memory": "2GiB"},
        "reconstruction": {"passes": 3},
        "distillation": {"epochs": 1},
    }


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (PruneRecipe, {"windows": 4}, "'calibration.windows'"),
        (PruneRecipe, {"sparsty": 0.5}, "sparsty: unknown key; did you mean 'sparsity'?"),
        (StructureRecipe, {"kv_group": 2}, "'kv_groups'"),
        (TrainRecipe, {"lora": {"rnk": 2}}, "lora.rnk: unknown key; did you mean 'rank'?"),
        (EvaluateRecipe, {"num_fewshot": 5}, "'shots'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_right_one(kind, values, said) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        build_recipe(kind, {"model": "m", **values})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("prun", "m"), '"prune"'),
        (("prune", "m", "--sparsty", 0.5), "--sparsity?"),
        (("prune", "m", "--include", "a", "b"), "'b'"),
        (("prune", "m", "--sparsity"), "--sparsity requires"),
    ],
)
def test_a_flag_that_there_is_not_is_refused_with_the_right_one(secateur, words, said) -> None:
    done = secateur(*words)
    assert done.code == 2
    assert said in " ".join(done.err.split())


ALIASES = [
    ("generate", ("--max-tokens", "0"), "--max-new-tokens 0"),
    ("generate", ("--kv-cache-dtype", "int9"), "--kv-cache int9"),
    ("serve", ("--max-num-seqs", "0"), "--slots 0"),
    ("serve", ("--parallel", "65"), "--slots 65"),
    ("serve", ("--max-model-len", "1"), "--context-length 1"),
    ("serve", ("--ctx-size", "1"), "--context-length 1"),
    ("train", ("--lora-r", "0"), "--lora 0"),
    ("train", ("--target-modules", ""), "--lora-targets"),
    ("train", ("--max-steps", "0"), "--steps 0"),
    ("train", ("--num-train-epochs", "0"), "--epochs 0"),
    ("train", ("--micro-batch-size", "0"), "--micro-batch-windows 0"),
    ("evaluate", ("--num-fewshot", "-1"), "--shots -1"),
    ("serve", ("--slots", "2", "--parallel", "2"), "--parallel is --slots"),
]


@pytest.mark.parametrize(("verb", "words", "said"), ALIASES)
def test_the_flags_of_other_tools_are_known_and_not_shown(secateur, verb, words, said) -> None:
    done = secateur(verb, "m", *words)
    assert done.code == 2
    assert said in " ".join(done.err.split())
    assert f"{words[-2]} " not in secateur(verb, "--help").out


def test_all_unknown_flags_are_reported_at_once(secateur) -> None:
    done = secateur("prune", "m", "--window", 4, "--generated", 2, "--sparsity", 0.5, "--json")
    assert "error: 2 faults:" in done.err
    assert "--generated-windows" in done.out


def test_text_of_flags_becomes_values() -> None:
    recipe, _ = recipe_from_flags(
        StructureRecipe,
        {"model": "m", "ffn": "0.75", "kv_groups": "2", "hidden_size": "1.0",
         "method_parameters": ["iterations=3", "growth=1.5"]},
        ["memory.max_memory=3GiB"],
    )  # fmt: skip
    assert (recipe.ffn, recipe.kv_groups, recipe.hidden_size) == (0.75, 2, 1.0)
    assert recipe.method_parameters == {"iterations": 3, "growth": 1.5}
    assert recipe.memory.max_bytes == 3 * 2**30
    pruned, _ = recipe_from_flags(TrainRecipe, {"model": "m", "gradual": "2:4"})
    assert pruned.gradual.pattern == "2:4"
    given = {"model": "m", "lora": "8", "text": ["a", "b"], "top_k": "64"}
    taught, _ = recipe_from_flags(
        TrainRecipe,
        {**given, "teacher": "m"},
        ["lora.alpha=4"],
    )
    assert (taught.lora.rank, taught.lora.alpha) == (8, 4)
    named, _ = recipe_of(TrainRecipe, {"model": "m"}, {"lora_alpha": 4.0, "lora": 8})
    assert (named.lora.rank, named.lora.alpha) == (8, 4)
    alone, _ = recipe_from_flags(TrainRecipe, {"model": "m", "lora_targets": ["q_proj,v_proj"]})
    assert (alone.lora.rank, alone.lora.targets) == (16, ("q_proj", "v_proj"))
    assert taught.text == ("a", "b")


def test_text_that_is_no_value_is_one_fault_among_all() -> None:
    given = {"model": "m", "sparsity": "a lot", "windows": "1.5", "asymmetric_damping": "nan"}
    infinite = {"distill_hidden": "inf", "distill_next_token": "-inf"}
    with pytest.raises(RecipeError) as error:
        recipe_from_flags(PruneRecipe, given | infinite)
    _, *faults = error.value.what.splitlines()
    named = sorted(fault.strip().partition(":")[0] for fault in faults)
    assert named == [
        *("--asymmetric-damping nan", "--distill-hidden inf", "--distill-next-token -inf"),
        *("--sparsity 'a lot'", "--windows 1.5"),
    ]


FORMS = [
    ({"windows": "0"}, "--windows 0", "windows=0"),
    ({"effort": "fats"}, "--effort fats", "effort='fats'"),
    ({"sparsity": "2"}, "--sparsity 2", "sparsity=2.0"),
    ({"method_parameters": ["damping=x"]}, "--method-parameters damping=x",
     "method_parameters.damping='x'"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "on_the_command_line", "in_python"), FORMS)
def test_a_fault_names_what_the_user_wrote(flags, on_the_command_line, in_python) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_from_flags(PruneRecipe, {"model": "m", **flags})
    assert str(error.value).partition(": ")[0] == on_the_command_line
    assert ("'fast'" in str(error.value)) == ("effort" in flags)
    read = {o.path: read_flag(o, flags[o.name]) for o in options_of(PruneRecipe) if o.name in flags}
    [(path, value)] = read.items()
    keyword = next(o.name for o in options_of(PruneRecipe) if o.path == path)
    with pytest.raises(RecipeError) as error:
        recipe_of(PruneRecipe, {"model": "m"}, {keyword: value})
    assert str(error.value).partition(": ")[0] == in_python


def test_errors_in_python_name_keywords(tmp_path) -> None:
    with pytest.raises(RecipeError) as error:
        secateur.prune("m", output=tmp_path / "o", method="wanda")
    assert "sparsity" in str(error.value.remedy)
    assert "--" not in str(error.value)
    with pytest.raises(RecipeError) as error:
        secateur.advise("llama-3.1-8b", hardware="h10")
    assert error.value.where == "hardware"
    assert "--" not in str(error.value)


def test_a_fault_in_yaml_names_the_key() -> None:
    with pytest.raises(RecipeError) as error:
        build_call(PruneRecipe, {"model": "m", "calibration": {"windows": 0}}, {}, where="r.yaml")
    assert error.value.what.startswith("calibration.windows=0: ")
    assert error.value.where == "r.yaml"
