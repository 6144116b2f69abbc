"""The task of language models: learning from prompts and completions, from chats, or from plain text.

task: causal-lm
data:
train: questions.jsonl    # CSV, JSON lines, Parquet, a folder of texts, or a hub name
prompt: question          # the column with the text that the model reads
completion: answer        # the column with the text that it learns to write
loss_on: completion       # learn only the completions
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rankwise.recipes.data.rows import RowsRecipe, check_sources, hold_out, read_tables
from rankwise.recipes.data.splits import shortest_first
from rankwise.recipes.errors import Problem, refusal
from rankwise.recipes.memory.batches import text_batch
from rankwise.recipes.models import (
    load_model,
    load_tokenizer,
    loading_arguments,
    model_config,
    padding_config,
    token_limit,
)
from rankwise.recipes.recipe import TrainingSection
from rankwise.recipes.tasks import Metric, TaskData
from rankwise.recipes.tasks.causal_lm.examples import (
    LanguageData,
    check_tokenizer,
    read_examples,
    read_source,
    source_problems,
    split_into_tokens,
    turn,
    turns_of,
)
from rankwise.recipes.tasks.causal_lm.language import (
    Message,
    Prompt,
    end_of_prompt,
    perplexity_metrics,
    prompt_ids,
    token_losses,
    write_on,
)

if TYPE_CHECKING:
    from torch import Tensor

TASK_TYPE = "CAUSAL_LM"
# The most tokens of an example by default. Many models take more, but memory may not.
_LENGTH = 1024


class LanguageTraining(TrainingSection):
    """The section ``training`` with smaller default batches, because logits for long examples take much memory."""

    per_device_train_batch_size: int = Field(default=4, ge=1)
    per_device_eval_batch_size: int = Field(default=4, ge=1)


class Recipe(RowsRecipe):
    """A recipe for a language model.

    Args:
        task: ``causal-lm``.
        data: the section about the texts.
        training: how long and how to train.
        samples: prompts for samples before and after training, or the number of held-out examples to make them from.
        sample_tokens: the most tokens of a sample, 1 or more.
    """

    task: Literal["causal-lm"]
    data: LanguageData
    training: LanguageTraining = LanguageTraining()
    samples: int | list[str] = 2
    sample_tokens: int = Field(default=64, ge=1)

    free_when_resuming = RowsRecipe.free_when_resuming | {"samples", "sample_tokens"}


@dataclass(frozen=True)
class LanguageTaskData(TaskData):
    """The tokens and labels of the examples, and the prompts of samples."""

    prompts: Sequence[Prompt] = ()


# --- data --------------------------------------------------------------------------------------------------------


def check(recipe: Recipe) -> Iterator[Problem]:
    """The problems of a recipe: missing files, columns or model, or empty prompts."""
    yield from check_sources(recipe, source_problems)
    if isinstance(recipe.samples, int) and recipe.samples < 0:
        yield Problem("samples", f"must be at least 0, but is {recipe.samples}.")
    if isinstance(recipe.samples, list) and not all(prompt.strip() for prompt in recipe.samples):
        yield Problem("samples", "must not hold an empty prompt.")


def read_data(recipe: Recipe) -> LanguageTaskData:
    """Read all rows, hold out examples, and split them into tokens."""
    tokenizer = processor(recipe)
    check_tokenizer(recipe.data, tokenizer)
    limit = token_limit(recipe.data.max_length, tokenizer, model_config(recipe), _LENGTH)
    tables = read_tables(recipe, read_source)
    notes = [note for table in tables for note in table.notes]
    sets = [read_examples(recipe.data, table, notes) for table in tables]
    columns = [name for name in sets[0].column_names if name != "row"]
    parts = hold_out(recipe.data, sets, notes, unique=columns)
    tokens = [
        split_into_tokens(recipe.data, tokenizer, limit, part, table, notes)
        for part, table in zip(parts, (tables[0], tables[-1]), strict=True)
    ]
    return LanguageTaskData(tokens[0], tokens[1], notes, prompts=_prompts(recipe, tokenizer, limit, parts[1]))


# --- model -------------------------------------------------------------------------------------------------------


def processor(recipe: Recipe) -> Any:
    """The model's tokenizer."""
    return load_tokenizer(recipe)


def new_model(recipe: Recipe, data: TaskData, processor: Any, *, weights: bool) -> Any:
    """The language model. It gets no new head.

    Raises:
        RecipeError: the model is an encoder. Its tokens see those that follow, which are the ones to predict.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    model = load_model(recipe, "AutoModelForCausalLM", padding_config(recipe, processor), weights=weights)
    config = model.config
    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes:
        raise refusal(
            "model",
            f"{recipe.model!r} is an encoder ({config.model_type}), whose tokens see those that follow. So it can't "
            "learn to continue texts. Choose a model that was trained to, such as HuggingFaceTB/SmolLM2-135M.",
            str(recipe.source),
        )
    return model


def largest_batch(recipe: Recipe, config: Any) -> Mapping[str, Tensor]:
    """A batch of examples with ``data.max_length`` tokens."""
    takes = getattr(config, "max_position_embeddings", None) or _LENGTH
    length = recipe.data.max_length or min(takes, _LENGTH)
    return text_batch(recipe.training.per_device_train_batch_size, length)


def trainer_arguments(
    recipe: Recipe, data: TaskData, processor: Any, model: Any
) -> tuple[dict[str, Any], list[str]]:
    """The examples and the perplexity. The trainer pads examples batch by batch."""
    from transformers import DataCollatorForSeq2Seq

    from rankwise.recipes.tasks.causal_lm.trainer import LanguageTrainer

    return {
        "trainer": LanguageTrainer,
        "train_dataset": data.train,
        "eval_dataset": shortest_first(data.evaluation),
        "processing_class": processor,
        "data_collator": DataCollatorForSeq2Seq(processor),
        "compute_metrics": perplexity_metrics,
        "preprocess_logits_for_metrics": token_losses,
    }, []


# --- results -----------------------------------------------------------------------------------------------------


def metrics(recipe: Recipe) -> Sequence[Metric]:
    """Perplexity and loss per token."""
    return Metric("perplexity", "perplexity", ",.2f", greater_is_better=False), Metric(
        "loss", "loss per token", greater_is_better=False
    )


def _prompts(recipe: Recipe, tokenizer: Any, limit: int, rows: Any) -> list[Prompt]:
    """The prompts of the samples."""
    if isinstance(recipe.samples, list):
        return [Prompt(text, _prompt_ids(recipe, tokenizer, text)) for text in recipe.samples]
    count = min(recipe.samples, len(rows))
    return [_prompt(recipe, tokenizer, limit, row) for row in rows.select(range(count))]


def _prompt_ids(recipe: Recipe, tokenizer: Any, text: str) -> list[int]:
    """A prompt's tokens, in the chat template if the examples are chats."""
    if recipe.data.is_chat:
        return _asked(tokenizer, [turn("user", text)])
    return prompt_ids(tokenizer, text)


def _asked(tokenizer: Any, turns: Sequence[Message]) -> list[int]:
    """The tokens of a chat, up to the beginning of the assistant's next turn."""
    encoded = tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def _prompt(recipe: Recipe, tokenizer: Any, limit: int, row: Mapping[str, Any]) -> Prompt:
    """The beginning of a held-out example as a prompt, and its continuation."""
    room = max(1, limit - recipe.sample_tokens)
    if recipe.data.form == "text":
        ids = prompt_ids(tokenizer, row["text"])
        # The prompt is the first quarter of the text, but at most 32 tokens.
        count = min(max(1, len(ids) // 4), 32, room)
        rest = tokenizer.decode(ids[count : count + recipe.sample_tokens], skip_special_tokens=True)
        return Prompt(tokenizer.decode(ids[:count], skip_special_tokens=True), ids[:count], rest.strip())
    if recipe.data.form == "prompt":
        ids = _prompt_ids(recipe, tokenizer, row["prompt"])
        return Prompt(row["prompt"], end_of_prompt(tokenizer, ids, room), row["completion"].strip())
    turns = turns_of(row)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
    asked = turns[:last] or turns[:1]
    expected = turns[last]["content"].strip() if 0 < last < len(turns) else None
    return Prompt(asked[-1]["content"], end_of_prompt(tokenizer, _asked(tokenizer, asked), room), expected)


def samples(recipe: Recipe, data: LanguageTaskData, processor: Any, model: Any) -> list[dict[str, str]]:
    """A sample for each prompt: ``prompt``, ``written`` and, if it is known, ``expected``."""
    return [
        {
            "prompt": prompt.text,
            "written": write_on(model, processor, prompt, recipe.sample_tokens),
            **({} if prompt.expected is None else {"expected": prompt.expected}),
        }
        for prompt in data.prompts
    ]


def usage(recipe: Recipe, data: LanguageTaskData, base: str, folder: str) -> str:
    """Python lines that continue a text with the saved adapter."""
    prompt = data.prompts[0].text if data.prompts else "Once upon a time"
    if len(prompt) > 60:
        prompt = prompt[:60].rsplit(maxsplit=1)[0]
    inputs = f'tokenizer({prompt!r}, return_tensors="pt")'
    if recipe.data.is_chat:
        chat = [turn("user", prompt)]
        inputs = (
            f"tokenizer.apply_chat_template(\n    {chat!r},\n"
            '    add_generation_prompt=True, return_tensors="pt", return_dict=True\n)'
        )
    lines = (
        "import rankwise as rw",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"folder = {folder!r}",
        f"base = AutoModelForCausalLM.from_pretrained({loading_arguments(base)})",
        "model = rw.PeftModel.from_pretrained(base, folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"inputs = {inputs}",
        f"written = model.generate(**inputs, max_new_tokens={recipe.sample_tokens})",
        "print(tokenizer.decode(written[0], skip_special_tokens=True))",
    )
    return "\n".join(lines)
