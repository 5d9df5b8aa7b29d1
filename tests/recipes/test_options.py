"""One declaration of every option: sections give flags, keywords, help and errors."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import secateur
from secateur.cli.app import make_app
from secateur.errors import RecipeError
from secateur.recipes.flags import read_flag, recipe_from_flags
from secateur.recipes.keywords import recipe_of
from secateur.recipes.old_names import OLD_NAMES
from secateur.recipes.options import options_of, run_options_of
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe, nested
from secateur.recipes.section import GROUPS
from secateur.recipes.structure import StructureRecipe
from secateur.recipes.train import TrainRecipe
from secateur.recipes.verbs import VERBS, imported

DECLARED = list(VERBS.values())
IN_PYTHON = [verb for verb in DECLARED if verb.function]


@pytest.mark.parametrize("verb", DECLARED, ids=lambda verb: verb.name)
def test_every_option_has_a_sentence_a_default_and_a_name_of_its_own(verb) -> None:
    kind = imported(verb.recipe)
    options = [*options_of(kind), *run_options_of(kind)]
    names = [option.name for option in options]
    assert len(names) == len(set(names))
    for option in options:
        assert option.help[-1] == "."
        assert option.help[0].isupper() or option.help.split()[0] in option.about
        assert option.default
        assert option.group in GROUPS


@pytest.mark.parametrize("verb", IN_PYTHON, ids=lambda verb: verb.name)
def test_the_signature_has_every_option(verb) -> None:
    function = imported(verb.function)
    assert inspect.unwrap(getattr(secateur, verb.python)) is function
    kind = imported(verb.recipe)
    parameters, told = dict(inspect.signature(function).parameters), function.__doc__
    for option in [*options_of(kind), *run_options_of(kind)]:
        if (verb.name, option.name) == ("diagnose", "machine"):  # of the machine, not of a model
            continue
        assert option.name in parameters
        assert f"{option.name}: " in told
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert "**options" not in told


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


@pytest.mark.parametrize("verb", ["prune", "structure", "train", "evaluate", "compress"])
def test_help_of_a_verb_imports_no_torch(verb: str) -> None:
    script = (
        f"import sys; sys.argv = ['secateur', {verb!r}, '--help']\n"
        "from secateur.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


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
        (PruneRecipe, {"samples": 4}, "samples: this key is now called 'windows'"),
        (PruneRecipe, {"calibration": {"samples": 4}}, "calibration.samples: .* called 'windows'"),
        (PruneRecipe, {"calibration": {"generated": 4}}, "now called 'generated_windows'"),
        (PruneRecipe, {"parameters": {"bits": 8}}, "now called 'method_parameters'"),
        (PruneRecipe, {"passes": 1}, "now called 'tune_passes'"),
        (PruneRecipe, {"epochs": 1}, "now called 'distill_epochs'"),
        (PruneRecipe, {"learning_rate": 1e-3}, "now called 'tune_learning_rate'"),
        (PruneRecipe, {"windows": 4}, "in a recipe this is 'calibration.windows'"),
        (StructureRecipe, {"heads": 2}, "now called 'kv_groups'"),
        (StructureRecipe, {"hidden": 2}, "now called 'hidden_size'"),
        (StructureRecipe, {"parameters": 0.8}, "'keep_parameters' or 'method_parameters'"),
        (TrainRecipe, {"hidden": 0.5}, "now called 'hidden_weight'"),
        (TrainRecipe, {"micro_batch": 2}, "now called 'micro_batch_windows'"),
        (TrainRecipe, {"validation": "x"}, "now called 'validation_text'"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(kind, values, said) -> None:
    with pytest.raises(RecipeError, match=said):
        build_recipe(kind, {"model": "m", **values})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("prune", "m", "--samples", 4), "--samples: this option is now called --windows"),
        (("prune", "m", "--epochs=2"), "--epochs: this option is now called --distill-epochs"),
        (("structure", "m", "--parameters", 0.8), "called --keep-parameters or --method-param"),
        (("structure", "m", "--heads", 2), "now called --kv-groups"),
        (("evaluate", "m", "--perplexity", "x"), "now called --text"),
        (("evaluate", "m", "--reference", "x"), "now called --dense"),
        (("evaluate", "m", "--max-windows", 3), "now called --windows"),
        (("eval", "m"), "'eval': this verb is now called 'evaluate'"),
        (("retrain", "m"), "'retrain': this verb is now called 'train'"),
        (("distill", "m", "--teacher", "t"), "'distill': this verb is now called 'train'"),
        (("prun", "m"), "unknown verb; did you mean 'prune'?"),
        (("prune", "m", "--sparsty", 0.5), "--sparsty: unknown option; did you mean --sparsity?"),
        (("prune", "m", "--include", "a", "b"), "'b': unexpected"),
        (("prune", "m", "--sparsity"), "--sparsity: a value is missing"),
    ],
)
def test_a_flag_that_there_is_not_is_refused_with_the_right_one(secateur, words, said) -> None:
    done = secateur(*words)
    assert done.code == 2
    assert said in " ".join(done.err.split())


def test_all_unknown_flags_are_told_at_once(secateur) -> None:
    done = secateur("prune", "m", "--samples", 4, "--generated", 2, "--sparsity", 0.5, "--json")
    assert "error: 2 faults:" in done.err
    assert "--generated-windows" in done.out


def test_old_names_of_functions_are_refused_with_the_new_one() -> None:
    with pytest.raises(AttributeError, match="now called 'evaluate'"):
        secateur.judge  # noqa: B018
    with pytest.raises(RecipeError, match="now called 'windows'"):
        secateur.prune("m", output="o", sparsity=0.5, samples=3)


def test_the_table_of_old_names_leads_to_names_that_exist() -> None:
    known = {o.name for verb in DECLARED for o in options_of(imported(verb.recipe))} | {*VERBS}
    for new in OLD_NAMES.values():
        assert known.issuperset(new)


def test_text_of_flags_becomes_values() -> None:
    recipe = recipe_from_flags(
        StructureRecipe,
        {"model": "m", "ffn": "0.75", "kv_groups": "2", "hidden_size": "1.0",
         "method_parameters": ["iterations=3", "growth=1.5"], "pad": True},
        ["memory.max_memory=3GiB"],
    )  # fmt: skip
    assert (recipe.ffn, recipe.kv_groups, recipe.hidden_size) == (0.75, 2, 1.0)
    assert recipe.method_parameters == {"iterations": 3, "growth": 1.5}
    assert recipe.pad
    assert recipe.memory.max_bytes == 3 * 2**30
    given = {"model": "m", "lora": "8", "gradual": "2:4", "text": ["a", "b"], "top_k": "64"}
    taught = recipe_from_flags(
        TrainRecipe,
        {**given, "teacher": "m", "hidden_weight": 1.0, "teacher_layers": ["0,3", "5"]},
        ["lora.alpha=4"],
    )
    assert (taught.lora.rank, taught.lora.alpha) == (8, 4)
    assert taught.gradual.pattern == "2:4"
    assert taught.text == ("a", "b")
    assert taught.teacher_layers == (0, 3, 5)


def test_text_that_is_no_value_is_one_fault_among_all() -> None:
    given = {"model": "m", "sparsity": "a lot", "windows": "1.5", "tune_learning_rate": "nan"}
    with pytest.raises(RecipeError, match="3 faults") as error:
        recipe_from_flags(PruneRecipe, given)
    for fault in (
        "--sparsity 'a lot': must be a number",
        "--windows 1.5: must be a whole number",
        "--tune-learning-rate nan: must be a finite number",
    ):
        assert fault in error.value.what


FORMS = [
    ({"windows": "0"}, [], "--windows 0: must be 1 or more", "windows=0: must be 1 or more"),
    ({"effort": "fats"}, [], "--effort fats: must be fast, balanced or best; did you mean fast?",
     "effort='fats': must be fast, balanced or best; did you mean fast?"),
    ({"sparsity": "2"}, [], "--sparsity 2: must be less than 1",
     "sparsity=2.0: must be less than 1"),
    ({"method_parameters": ["damping=x"]}, [], "--method-parameters damping=x: must be a number",
     "method_parameters.damping='x': must be a number"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "assignments", "on_the_command_line", "in_python"), FORMS)
def test_a_fault_names_what_the_user_wrote(
    flags, assignments, on_the_command_line, in_python
) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_from_flags(PruneRecipe, {"model": "m", **flags}, assignments)
    assert str(error.value) == on_the_command_line
    read = {o.path: read_flag(o, flags[o.name]) for o in options_of(PruneRecipe) if o.name in flags}
    [(path, value)] = read.items()
    keyword = next(o.name for o in options_of(PruneRecipe) if o.path == path)
    with pytest.raises(RecipeError) as error:
        recipe_of(PruneRecipe, {"model": "m"}, {keyword: value})
    assert str(error.value) == in_python


def test_errors_in_python_name_keywords(tmp_path) -> None:
    with pytest.raises(RecipeError) as error:
        secateur.prune("m", output=tmp_path / "o", sparsity=2)
    assert str(error.value) == "sparsity=2: must be less than 1"
    with pytest.raises(RecipeError) as error:
        secateur.prune("m", output=tmp_path / "o", method="wanda")
    assert error.value.remedy == "add sparsity, for example sparsity=0.5"
    with pytest.raises(RecipeError) as error:
        secateur.advise("llama-3.1-8b", hardware="h10")
    assert error.value.where == "hardware"
    assert "--" not in str(error.value)


def test_a_fault_in_yaml_names_the_key() -> None:
    with pytest.raises(RecipeError) as error:
        build_recipe(PruneRecipe, {"model": "m", "calibration": {"windows": 0}}, where="r.yaml")
    assert error.value.what == "calibration.windows=0: must be 1 or more"
    assert error.value.where == "r.yaml"


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_are_finite(number: str) -> None:
    with pytest.raises(RecipeError, match="finite number"):
        recipe_from_flags(TrainRecipe, {"model": "m", "temperature": number})
