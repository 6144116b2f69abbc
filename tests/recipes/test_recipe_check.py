"""A recipe is checked completely before anything is loaded. Messages give place, fault and nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankwise.config.suggest import nearest
from rankwise.recipes import RecipeError, load_recipe
from rankwise.recipes.data.rows import read_tables
from rankwise.recipes.models import model_place
from recipe_world import write_recipe, write_table


@pytest.fixture
def world(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    write_table(tmp_path / "reviews.csv")
    return tmp_path


def problems(world: Path, *overrides: str, **changes: object) -> str:
    path = write_recipe(world, world / "model", **changes)
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    return str(error.value)


def test_a_good_recipe_gives_its_values_and_defaults(world: Path) -> None:
    recipe = load_recipe(
        write_recipe(world, world / "model"), ["training.seed=7", "training.learning_rate=1e-3"]
    )
    assert recipe.method == "adalora"
    assert recipe.training.seed == 7
    assert recipe.training.learning_rate == 0.001  # PyYAML alone would read 1e-3 as text
    assert recipe.training.save_total_limit == 2
    assert recipe.overrides == ("training.seed=7", "training.learning_rate=1e-3")


def test_unknown_keys_are_refused_with_line_and_nearest_name(world: Path) -> None:
    message = problems(world, training__learning_rat=0.1)
    assert "training.learning_rat: unknown key. Did you mean 'learning_rate'?" in message
    line = (world / "recipe.yaml").read_text().splitlines().index("  learning_rat: 0.1") + 1
    assert f"line {line}," in message
    assert str(world / "recipe.yaml") in message


def test_a_value_from_the_command_line_is_not_sought_in_the_file(world: Path) -> None:
    message = problems(world, "training.max_steps=ten", data__txt="a")
    assert "override of training.max_steps: must be a whole number, but is 'ten'." in message
    assert message.count("line ") == 1 and message.index("data.txt") < message.index("max_steps")
    assert "override of training.max_steps: must" in problems(world, "training={max_steps: ten}")
    message = problems(world, "schedule.tinit=0.9")
    assert "with schedule.tinit=0.9, schedule: " in message and "0.9" in message


def test_a_recipe_of_adalora_made_one_of_lora_says_which_keys_to_take_out(world: Path) -> None:
    message = problems(world, "adapter.method=lora", adapter__init_r=12, schedule__tinit=0.1)
    for key, said in (
        ("adapter.init_r", "adapter.r"),
        ("adapter.target_r", "adapter.r"),
        ("schedule", "ranks are fixed"),
    ):
        [line] = [line for line in message.splitlines() if f", {key}: " in line]
        assert said in line and f"'~{key}'" in line, message
    taken = [f"~{key}" for key in ("adapter.init_r", "adapter.target_r", "schedule")]
    recipe = load_recipe(world / "recipe.yaml", ["adapter.method=lora", *taken, "adapter.r=4"])
    assert recipe.method == "lora"


@pytest.mark.parametrize(
    ("key", "meant"),
    [("epochs", "num_train_epochs"), ("batch_size", "per_device_train_batch_size"), ("lr", "learning_rate")],
)
def test_common_names_lead_to_the_real_ones(world: Path, key: str, meant: str) -> None:
    assert f"Did you mean {meant!r}?" in problems(world, f"training.{key}=1")


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(world: Path) -> None:
    message = problems(world, "dtype=float7", training__max_steps="ten", data__txt="a", adapter__init_rank=3)
    assert "4 problems" in message
    assert (
        message.index("data.txt") < message.index("adapter.init_rank") < message.index("training.max_steps")
    )
    assert message.index("training.max_steps") < message.index("dtype")


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("training.max_steps=ten", "training.max_steps: must be a whole number, but is 'ten'."),
        ("training.max_steps=1.5", "training.max_steps: must be a whole number, but is 1.5."),
        (
            "training.dataloader_num_workers=999999",
            "training.dataloader_num_workers: must be at most 1024, but is 999999.",
        ),
        ("training.max_steps=0", "training.max_steps: must be at least 1, but is 0."),
        ("training.learning_rate=-1", "training.learning_rate: must be more than 0, but is -1."),
        ("training.learning_rate=.nan", "training.learning_rate: must be a finite number"),
        ("training.bf16=7", "training.bf16: must be true or false, but is 7."),
        ("training=3", "training: must be a section of `key: value` lines, but is 3."),
        ("training.lr_scheduler_type=cosin", "Did you mean 'cosine'?"),
        ("schedule.tinit=true", "schedule.tinit: must be a"),
        ("schedule.tinit=1.5", "fraction of the run must be in [0, 1), but is 1.5"),
        ("schedule.total_step=5", "comes from training.max_steps or training.num_train_epochs"),
        ("adapter.total_step=5", "comes from training.max_steps or training.num_train_epochs"),
        ("adapter.tinit=5", "belongs in the section `schedule`"),
        ("adapter.r=8", "Set init_r (at the start) and target_r (at the end)"),
        ("adapter.target_r=9", "adapter.target_r: "),
        ("adapter.lora_dropout=2", "adapter.lora_dropout: "),
        ("adapter.method=adalor", "there is no method 'adalor'. Did you mean 'adalora'?"),
        ("adapter.task_type=SEQ_CLS", "is set by the task"),
        (
            "task=text-clasification",
            "there is no task 'text-clasification'. Did you mean 'text-classification'?",
        ),
        ("problem_type=regresion", "Did you mean 'regression'?"),
        ("output=", "output: must be text, but is None."),
        ("data.held_out=1.5", "must be between 0 and 1, but is 1.5"),
        ("data.held_out=rest", "`held_out: rest` needs `train_size`"),
        ("data.labels=[a]", "data.labels: "),
        (
            "data.labels=[no, maybe]",
            "data.labels.0: must be text, but is False. YAML reads yes, no, on and off",
        ),
        ("data.max_length=99999999999999999999", "data.max_length: must be less than 2**63"),
        ("training.data_seed=99999999999999999999", "training.data_seed: must be less than 2**63"),
        ("adapter.target_modules={a: 1}", "override adapter.target_modules={a: 1}"),
        ("training.lr_scheduler_kwargs=abc", "training.lr_scheduler_kwargs: must be a section"),
        ("training.lr_scheduler_kwargs={a: 1}", "do not fit lr_scheduler_type: linear (get_linear"),
        ("training.lr_scheduler_type=warmup_stable_decay", "training.lr_scheduler_kwargs: do not fit"),
        ("training.gradient_checkpointing_kwargs=abc", "gradient_checkpointing_kwargs: must be a section"),
        ("training.optim_args=abc", "training.optim_args: must be text such as"),
        ("training.label_smoothing_factor=-1", "label_smoothing_factor: must be at least 0"),
        ("training.label_smoothing_factor=.nan", "label_smoothing_factor: must be at least 0"),
        ("training.dataloader_persistent_workers=true", "needs dataloader_num_workers of 1 or more"),
        ("training.train_sampling_strategy=length", "must be one of random, sequential"),
    ],
)
def test_wrong_values_are_refused_with_the_rule(world: Path, override: str, rule: str) -> None:
    assert rule in problems(world, override)


def test_a_union_of_types_gives_one_message(world: Path) -> None:
    assert problems(world, "schedule.tinit=x").count("schedule.tinit") == 1


def test_a_schedule_that_leaves_no_step_for_pruning_is_refused_early(world: Path) -> None:
    message = problems(world, "schedule.tinit=6", "schedule.tfinal=5")
    assert "schedule: The schedule leaves no step for pruning" in message
    assert "Nearest that works" in message


def test_missing_keys_are_named(world: Path) -> None:
    assert "model: is missing." in problems(world, "~model")


def test_missing_files_are_refused_with_the_nearest_name(world: Path) -> None:
    message = problems(world, f"data.train={world}/reviws.csv")
    assert f"data.train: there is no file or folder '{world}/reviws.csv'." in message
    assert f"Did you mean '{world}/reviews.csv'?" in message
    assert "model: there is no file or folder" in problems(world, f"model={world}/modle")


def test_missing_columns_are_refused_with_key_file_and_nearest_name(world: Path) -> None:
    message = problems(world, "data.text=txt", "data.label=lable")
    assert (
        "data.text: reviews.csv has no column 'txt'; it has text, label, rating. Did you mean 'text'?"
        in message
    )
    assert "data.label: reviews.csv has no column 'lable'" in message


def test_a_table_with_other_separators_is_recognised(world: Path) -> None:
    (world / "reviews.csv").write_text("text;label\na;b\n")
    assert "its columns are separated by ';'" in problems(world)


def test_files_that_are_not_tables_are_refused(world: Path) -> None:
    (world / "notes.txt").write_text("x")
    assert "is a kind of file that can't be read" in problems(world, f"data.train={world}/notes.txt")
    (world / "empty.csv").write_text("")
    assert "is empty" in problems(world, f"data.train={world}/empty.csv")
    (world / "latin.csv").write_bytes("text,läbel\n".encode("latin-1"))
    assert "is not UTF-8" in problems(world, f"data.train={world}/latin.csv")
    (world / "broken.parquet").write_bytes(b"PAR1 and no more")
    assert "can't be read as parquet" in problems(world, f"data.train={world}/broken.parquet")


def test_paths_are_also_looked_for_in_the_recipes_folder(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = world / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(write_recipe(world, Path("model"), data__train="reviews.csv"))
    assert model_place(recipe).path == world / "model"
    (table,) = read_tables(recipe)
    assert table.place.path == world / "reviews.csv" and len(table.rows) == 60


def test_overrides_must_be_pairs(world: Path) -> None:
    assert "An override is key=value" in problems(world, "training.max_steps")
    assert "removes a key that the recipe does not have" in problems(world, "~training.nothing")


def test_an_override_can_take_a_key_out(world: Path) -> None:
    path = write_recipe(world, world / "model")
    assert load_recipe(path, ["~training.max_steps"]).training.max_steps is None


def test_broken_yaml_says_where(world: Path) -> None:
    path = world / "broken.yaml"
    for text, said in (
        ("model: [a", "not valid YAML"),
        ("model: a\nmodel: b\n", "duplicate key"),
        ("- a\n- b\n", "a recipe is a list of `key: value` lines"),
        ("", "a recipe is a list of `key: value` lines"),
        ("just words", "a recipe is a list of `key: value` lines"),
        ("task: ${nothing.there}\n", "nothing.there"),
        ("task: ???\n", "task"),
    ):
        path.write_text(text)
        with pytest.raises(RecipeError, match=said.replace("$", r"\$").replace("?", r"\?")):
            load_recipe(path)


def test_a_missing_recipe_is_reported_with_the_nearest_name(world: Path) -> None:
    write_recipe(world, world / "model")
    with pytest.raises(RecipeError, match=r"Did you mean 'recipe.yaml'"):
        load_recipe(world / "recipy.yaml")


def test_lora_takes_no_schedule(world: Path) -> None:
    lora = {"method": "lora", "r": 4, "target_modules": ["query"]}
    assert "schedule: is for `adapter.method: adalora`" in problems(world, adapter=lora)
    assert load_recipe(write_recipe(world, world / "model", adapter=lora, schedule=None)).method == "lora"


def test_packages_are_asked_for_by_name(world: Path) -> None:
    message = problems(world, "model=pypi:no-such-package-here")
    assert "the package 'no-such-package-here' is not installed" in message
    assert "pip install no-such-package-here" in message


def test_a_package_without_a_model_is_refused(world: Path) -> None:
    assert "model: the package 'pytest' is not one model" in problems(world, "model=pypi:pytest")
    assert "has no single path 'data'" in problems(world, "data.train=pypi:pytest/data")


def test_a_path_inside_a_package_is_found(world: Path) -> None:
    from rankwise.recipes.places import find_in_package

    assert find_in_package("pypi:pytest/_pytest/mark", "data.train").is_dir()
    assert find_in_package("pypi:pytest/_pytest/mark/structures.py", "data.train").is_file()


@pytest.mark.parametrize(
    ("word", "meant"), [("Learning-Rate", "learning_rate"), ("steps", "max_steps"), ("zz", None)]
)
def test_nearest_forgives_spelling_case_and_dashes(word: str, meant: str | None) -> None:
    assert nearest(word, ["learning_rate", "max_steps", "seed"], or_part=True) == meant


def test_the_default_learning_rate_is_loras(world: Path) -> None:
    recipe = load_recipe(write_recipe(world, world / "model", training={"max_steps": 10}))
    assert recipe.method == "adalora" and recipe.training.learning_rate == 5e-4
