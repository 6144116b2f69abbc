"""Data from every kind of source, messages about wrong rows by file and line, and the same split everywhere."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rankwise.recipes import RecipeError, load_recipe
from rankwise.recipes.data.splits import mixed_order, split_sizes
from rankwise.recipes.tasks import TaskData, load_task
from recipe_world import rows, write_recipe, write_table


@pytest.fixture
def world(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    write_table(tmp_path / "reviews.csv")
    return tmp_path


def read(world: Path, **changes: Any) -> TaskData:
    recipe = load_recipe(write_recipe(world, world / "model", **changes))
    return load_task(recipe.task).read_data(recipe)


def message(world: Path, **changes: Any) -> str:
    with pytest.raises(RecipeError) as error:
        read(world, **changes)
    return str(error.value)


def write_source(folder: Path, kind: str) -> Path:
    data = rows(60)
    if kind == "folder":
        for i, (text, label, _) in enumerate(data):
            (folder / "classes" / label).mkdir(parents=True, exist_ok=True)
            (folder / "classes" / label / f"{i:03}.txt").write_text(text)
        return folder / "classes"
    objects = [{"text": text, "label": label, "rating": rating} for text, label, rating in data]
    path = folder / f"data.{kind}"
    if kind == "parquet":
        import pandas

        pandas.DataFrame(objects).to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(objects))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(each) for each in objects) + "\n")
    else:
        path.write_text("text\tlabel\trating\n" + "".join(f"{a}\t{b}\t{c}\n" for a, b, c in data))
    return path


@pytest.mark.parametrize("kind", ["tsv", "json", "jsonl", "parquet", "folder"])
def test_every_source_gives_the_same_examples_as_csv(world: Path, kind: str) -> None:
    from_csv = read(world)
    other = read(world, data__train=str(write_source(world, kind)))
    assert other.labels == from_csv.labels == ["negative", "neutral", "positive"]
    assert len(other.train) + len(other.evaluation) == len(from_csv.train) + len(from_csv.evaluation)

    def pairs(data: TaskData) -> set[tuple[str, int]]:
        both = [*data.train, *data.evaluation]
        return {(row["text"], row["labels"]) for row in both}

    assert pairs(other) == pairs(from_csv)


def test_cells_of_a_table_are_taken_as_they_are(world: Path) -> None:
    (world / "reviews.csv").write_text('text,label\nNA,yes\n"null, or not",no\n007,yes\nb,no\nc,yes\nd,no\n')
    data = read(world, data__held_out=2)
    assert {row["text"] for row in [*data.train, *data.evaluation]} == {
        "NA",
        "null, or not",
        "007",
        "b",
        "c",
        "d",
    }


def test_a_row_without_a_label_is_named_by_file_and_line(world: Path) -> None:
    (world / "reviews.csv").write_text('text,label\n"two\nlines",a\n\nthird,\nfourth,b\n')
    assert "data.label: reviews.csv, line 5 has no label in 'label'." in message(world)
    (world / "reviews.jsonl").write_text('{"text": "a", "label": "x"}\n\n{"text": "b", "label": null}\n')
    assert "reviews.jsonl, line 3 has no label" in message(world, data__train=str(world / "reviews.jsonl"))


@pytest.mark.parametrize("value", [["a", "b"], ["a"], {"a": 1}], ids=str)
def test_a_row_with_several_labels_is_named_by_file_and_line(world: Path, value: object) -> None:
    texts = [json.dumps({"text": f"some {i} words", "label": value}) for i in range(6)]
    (world / "reviews.jsonl").write_text("\n".join(texts))
    said = message(world, data__train=str(world / "reviews.jsonl"))
    assert f"reviews.jsonl, line 1 holds {value} in 'label', where one label is expected." in said


def test_many_bad_rows_are_counted(world: Path) -> None:
    (world / "reviews.csv").write_text("text,label\n" + "some,a\n" + "word,\n" * 10)
    said = message(world)
    assert said.count("has no label") == 3
    assert "and 7 rows more like these in" in said


def test_an_unknown_label_is_refused_with_the_nearest(world: Path) -> None:
    (world / "test.csv").write_text("text,label\na film,positive\nan actor,negativ\n")
    said = message(world, data__eval=str(world / "test.csv"), data__held_out=None)
    assert "data.label: test.csv, line 3 has the unknown label 'negativ'. Did you mean 'negative'?" in said
    assert "has the unknown label 'neutral'" in message(world, data__labels=["negative", "positive"])


def test_a_rating_that_is_not_a_number_is_named(world: Path) -> None:
    (world / "reviews.csv").write_text("text,rating\na,1\nb,two\nc,nan\n")
    said = message(world, problem_type="regression", data__label="rating")
    assert "reviews.csv, line 3 'rating' is not a number: 'two'." in said
    assert "reviews.csv, line 4" in said


def test_numbers_as_labels_lead_to_regression(world: Path) -> None:
    (world / "reviews.csv").write_text("text,label\n" + "".join(f"t{i},{i / 7}\n" for i in range(60)))
    assert "set problem_type: regression" in message(world)


def test_whole_numbers_are_labels_in_their_own_order(world: Path) -> None:
    (world / "reviews.jsonl").write_text(
        "".join(json.dumps({"text": f"t{i}", "label": i % 12}) + "\n" for i in range(60))
    )
    data = read(world, data__train=str(world / "reviews.jsonl"))
    assert data.labels == [str(i) for i in range(12)]


def test_labels_can_be_given_in_an_order(world: Path) -> None:
    names = ["negative", "neutral", "positive"][::-1]
    assert read(world, data__labels=names).labels == names


def test_one_label_is_not_enough(world: Path) -> None:
    (world / "reviews.csv").write_text("text,label\na,x\nb,x\n")
    assert "has only the label 'x'" in message(world)


def test_texts_in_place_of_labels_are_refused(world: Path) -> None:
    (world / "reviews.csv").write_text(
        "text,label\n" + "".join(f"{i % 2},film number {i}\n" for i in range(60))
    )
    said = message(world)
    assert "reviews.csv has 60 different labels in 'label' for 60 examples, such as 'film number 0'" in said
    names = [f"film number {i}" for i in range(60)]
    data = read(world, data__labels=names, data__held_out=None, data__eval=str(world / "reviews.csv"))
    assert len(data.labels) == 60


def test_rows_without_text_are_left_out_and_reported(world: Path) -> None:
    with (world / "reviews.csv").open("a") as file:
        file.write(" ,positive,1\n")
    assert "1 row without text left out (reviews.csv, line 62)." in read(world).notes


def test_texts_of_a_held_out_file_that_are_trained_on_are_counted(world: Path) -> None:
    train = (world / "reviews.csv").read_text().splitlines()
    (world / "eval.csv").write_text("\n".join([train[0], *train[1:6], "a text of its own,negative,0"]) + "\n")
    data = read(world, data__eval=str(world / "eval.csv"), data__held_out=None)
    assert any("5 of 6 rows in `eval` are trained on, too" in note for note in data.notes)
    few = read(world, data__eval=str(world / "eval.csv"), data__held_out=None, data__train_size=3)
    assert not any("5 of 6" in note for note in few.notes)


def test_repeated_texts_are_never_both_trained_on_and_held_out(world: Path) -> None:
    with (world / "reviews.csv").open("a") as file:
        file.writelines(f"{text},{label},{rating}\n" for text, label, rating in rows(30))
    data = read(world)
    texts = [row["text"] for row in [*data.train, *data.evaluation]]
    assert len(texts) == len(set(texts))
    assert any("left out that repeat another's text" in note for note in data.notes)


def test_too_few_rows_after_repeats_were_left_out_are_explained(world: Path) -> None:
    (world / "reviews.csv").write_text("text,label\n" + "same,a\nsame,b\n" * 9)
    said = message(world)
    assert "17 rows left out that repeat another's text" in said and "There is 1 row" in said


def test_a_column_may_begin_in_a_later_line_of_json(world: Path) -> None:
    lines = [
        {"text": "a b", "label": "x"},
        *({"text": f"a {i}", "label": "xy"[i % 2], "other": "b"} for i in range(9)),
    ]
    (world / "reviews.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes = {"data__train": str(world / "reviews.jsonl")}
    data = read(world, **changes, data__text_pair="other")
    assert len(data.train) + len(data.evaluation) == 10
    said = message(world, **changes, data__label="lable")
    assert "has no column 'lable'; it has text, label, other. Did you mean 'label'?" in said


def test_broken_rows_are_named_by_line(world: Path) -> None:
    (world / "reviews.csv").write_text("text,label\na,x\nb, and more,y\n")
    assert "reviews.csv, line 3: 3 values for 2 columns" in message(world)
    broken = world / "reviews.jsonl"
    broken.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": \n')
    assert "reviews.jsonl, line 2: not valid JSON" in message(world, data__train=str(broken))


def test_texts_in_another_encoding_are_read_and_reported(world: Path) -> None:
    folder = write_source(world, "folder")
    (folder / "positive" / "999.txt").write_bytes("a caf\xe9".encode("latin-1"))
    data = read(world, data__train=str(folder))
    assert any("read as Windows-1252: classes/positive/999.txt" in note for note in data.notes)
    assert "a café" in {row["text"] for row in [*data.train, *data.evaluation]}


def test_a_folder_without_class_folders_is_refused(world: Path) -> None:
    said = message(world, data__train=str(world))
    assert (
        "has no sub-folders with .txt files, one for each label. It holds reviews.csv: name the file." in said
    )


def test_the_split_is_the_same_each_time_and_keeps_proportions(world: Path) -> None:
    write_table(world / "reviews.csv", 300)
    first, again = read(world, data__held_out=60), read(world, data__held_out=60)
    assert first.train["text"] == again.train["text"]
    assert first.train["text"] != read(world, data__held_out=60, data__split_seed=1).train["text"]
    counts = Counter(first.evaluation["labels"])
    assert max(counts.values()) - min(counts.values()) <= 2


def test_the_split_is_a_known_one(world: Path) -> None:
    """Every machine, Python version and library version must hold out the same rows."""
    assert mixed_order(list("aaabbbbb"), seed=3) == [5, 0, 7, 2, 6, 4, 1, 3]


def test_a_small_training_set_leaves_the_rest_held_out(world: Path) -> None:
    data = read(world, data__train_size=12, data__held_out="rest")
    assert len(data.train) == 12
    assert not set(data.train["text"]) & set(data.evaluation["text"])


def test_more_rows_than_there_are_is_refused(world: Path) -> None:
    assert "There are 60 rows: `held_out` takes 12, and `train_size` 5000." in message(
        world, data__train_size=5000
    )
    with pytest.raises(ValueError, match="needs `train_size`"):
        split_sizes(10, "rest", None)


def test_reading_leaves_nothing_behind(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    (world / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(world / "tmp"))
    data = read(world)
    assert list((world / "tmp").iterdir()) == []
    assert data.train[0]["text"]


def test_a_dataset_from_the_hub_keeps_the_names_of_its_labels(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, subset: str | None, split: str) -> Any:
        asked.append((name, subset, split))
        features = datasets.Features(
            {
                "text": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["world", "sports", "science"]),
            }
        )
        labels = [0, 1, 0, 1] if split == "train" else [1, -1]
        texts = [f"{split} {i}" for i in range(len(labels))]
        return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = {"data__train": "someone/news", "data__subset": "short"}
    data = read(world, data__held_out=1, **hub)
    assert asked == [("someone/news", "short", "train")]
    assert data.labels == ["world", "sports", "science"]
    said = message(world, data__held_out=None, data__eval_split="test", **hub)
    assert "someone/news, row 2 has no label in 'label'." in said


def test_a_name_that_is_neither_here_nor_on_the_hub_says_both(world: Path) -> None:
    assert "is not a file or folder here, and it can't be loaded as a hub dataset" in message(
        world, data__train="nobody/nothing"
    )


def test_a_split_of_a_file_is_refused(world: Path) -> None:
    assert "data.eval_split: is for datasets from the hub" in message(
        world, data__eval_split="test", data__held_out=None
    )


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "parquet"])
def test_a_table_without_rows_is_refused_before_it_is_read(world: Path, kind: str) -> None:
    """The message is rankwise's own, whatever the library says that reads such tables."""
    path = world / f"empty.{kind}"
    if kind == "parquet":
        import pandas

        pandas.DataFrame({"text": [], "label": []}).to_parquet(path)
    else:
        path.write_text({"csv": "text,label\n", "tsv": "text\tlabel\n\n", "json": " [ ]\n"}[kind])
    with pytest.raises(RecipeError) as error:
        load_recipe(write_recipe(world, world / "model", data__train=str(path)))
    assert f"{path.name}' has no rows" in str(error.value)
    assert kind == "json" or "only the names of its columns: text, label" in str(error.value)


@pytest.mark.parametrize(
    ("held_out", "train_size", "said"),
    [
        (15000, None, "There are 1530 rows: `held_out` takes 15000. At least 1 must train"),
        (1000, 1000, "`held_out` takes 1000, and `train_size` 1000."),
        ("rest", 1530, "nothing is left to hold out, and `train_size` 1530."),
    ],
)
def test_a_split_that_does_not_fit_names_the_requested_number_and_no_other(
    held_out: Any, train_size: int | None, said: str
) -> None:
    with pytest.raises(ValueError) as error:
        split_sizes(1530, held_out, train_size)
    assert said in str(error.value) and "-" not in str(error.value).replace("`", "")
