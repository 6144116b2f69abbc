"""Every example in README.md, CONTRIBUTING.md, docs/ and benchmarks/quality/ runs.

Each page runs in a folder of its own, and may use:

- the models that `workspace` makes: tiny random ones, under the names that pages use for real models;
- the names in `page_namespace`, such as ``batches``, which stand for the reader's own data;
- the recipes in `recipes/`, with tiny models and invented data instead of the real ones.

The Python blocks of a page run in one namespace, in order with its shell commands. A YAML block whose first line is a
comment with a file name is saved under that name. In shell blocks, `rankwise` commands are run; `make` targets and the
extras in `pip install` must exist; any other kind of command is an error.
"""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from image_world import save_tiny_vit, write_photos
from language_world import chats, questions, save_language_model, write_lines
from speech_world import save_tiny_whisper, write_manifest

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks" / "quality").glob("*.md")),
]
CAUSAL_LM = "HuggingFaceTB/SmolLM2-135M"
CHAT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
WHISPER = "openai/whisper-tiny.en"
VISION = "google/vit-base-patch16-224-in21k"
ONLY_CONFIGURED = {"openai/whisper-large-v3": "WhisperConfig", "huggyllama/llama-7b": "LlamaConfig"}
REVIEWS = [
    (f"the {subject} is {verdict} and {addition}", label)
    for label, verdicts in {"good": ("warm", "witty", "wise"), "bad": ("dull", "thin", "lost")}.items()
    for subject in ("film", "plot", "cast", "end")
    for verdict in verdicts
    for addition in ("long", "loud")
]

TRAIN_LONGEST = ("language-models", "speech-recognition")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.stem in TRAIN_LONGEST)) for page in PAGES],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_example_on_the_page_runs(page: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(workspace)
    if page.stem == "diffusers":  # it has an environment of its own: `make test-frameworks`
        pytest.importorskip("diffusers")
        from diffusion_world import save_pipelines

        save_pipelines(workspace)
    if page.stem == "ms-swift":
        monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
        monkeypatch.setitem(sys.modules, "swift.callbacks", ModuleType("swift.callbacks"))
        monkeypatch.setattr(sys.modules["swift.callbacks"], "callbacks_map", {}, raising=False)
    document = DOCUMENTATION.parse(page)
    document.namespace.update(page_namespace())
    for example in document.examples():
        example.evaluate()


@pages
def test_every_link_on_the_page_leads_to_a_file(page: Path):
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [
        target for target in targets if "://" not in target and not (page.parent / target).resolve().exists()
    ]
    assert not missing


def test_the_reference_has_every_public_name():
    import rankwise
    import rankwise.recipes
    import rankwise.recipes.sweep
    import rankwise.report

    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown = {path.rpartition(".")[2] for path in re.findall(r"^::: (rankwise\.\S+)$", pages, re.MULTILINE)}
    modules = (rankwise, rankwise.recipes, rankwise.recipes.sweep, rankwise.report)
    assert not {name for module in modules for name in module.__all__} - shown


# --- names and files that pages may use ----------------------------------------------------------------------------


def page_namespace() -> dict[str, Any]:
    """Data and arguments that stand for the reader's own."""
    from transformers import TrainingArguments

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 20, (6, 4, 8), generator=generator)
    labels = torch.randint(0, 2, (6, 4), generator=generator)
    return {
        "latents_and_prompts": [
            (torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 8, generator=generator))
            for _ in range(20)
        ],
        "batches": [{"input_ids": ids, "labels": ids} for ids in tokens],
        "classification_batches": [
            {"input_ids": ids, "labels": label} for ids, label in zip(tokens, labels, strict=True)
        ],
        "arguments": TrainingArguments("output", max_steps=6, learning_rate=5e-4, report_to="none"),
        "texts": [{"input_ids": ids, "labels": ids} for ids in tokens.flatten(0, 1)],
        "dataset": [
            {"input_ids": ids, "labels": label}
            for ids, label in zip(tokens.flatten(0, 1), labels.flatten(), strict=True)
        ],
    }


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models under the real models' names."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(llama).save_pretrained(folder / CAUSAL_LM)
    save_language_model(folder / CHAT_MODEL, max_position_embeddings=2048)
    save_tiny_whisper(folder / WHISPER)
    save_tiny_vit(folder / VISION)
    words = sorted({word for text, _ in REVIEWS for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    bert = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    BertForMaskedLM(bert).bert.save_pretrained(folder / ENCODER)
    BertTokenizerFast(vocab=vocabulary, model_max_length=64).save_pretrained(folder / ENCODER)
    for name, kind in ONLY_CONFIGURED.items():
        save_tiny_config(folder / name, kind)
    return folder


def save_tiny_config(folder: Path, kind: str) -> None:
    """Save a model's configuration without weights, for pages that need no more."""
    import transformers

    widths = (
        "hidden_size",
        "intermediate_size",
        "d_model",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "num_mel_bins",
    )
    counts = ("num_hidden_layers", "num_attention_heads", "encoder_layers", "decoder_layers")
    heads = ("encoder_attention_heads", "decoder_attention_heads")
    sizes = dict.fromkeys(widths, 16) | dict.fromkeys((*counts, *heads), 1)
    getattr(transformers, kind)(vocab_size=51866, **sizes).save_pretrained(folder)


@pytest.fixture
def workspace(models: Path, tmp_path: Path) -> Path:
    """A folder like the one in which a reader of the page works."""
    folder = tmp_path / "workspace"
    shutil.copytree(models, folder)
    with (folder / "reviews.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("review", "verdict", "stars"))
        writer.writerows((text, label, len(text) / 10) for text, label in REVIEWS)
    for i, (text, label) in enumerate(REVIEWS):
        file = folder / "documents" / label / f"{i:03}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    write_lines(folder / "questions.jsonl", questions()[:36])
    write_lines(folder / "chats.jsonl", chats()[:36])
    write_tagged(folder)
    write_manifest(folder / "speech")
    write_photos(folder, 24, ("cat", "dog"))
    (folder / "recipes").mkdir()
    for name, model, data in (
        ("quickstart", ENCODER, {"train": "documents", "train_size": 24}),
        ("smollm2", CHAT_MODEL, {"train": "documents", "train_size": 24, "max_length": 16}),
        ("whisper-tiny", WHISPER, {"held_out": 4, "max_seconds": 1, "max_tokens": 16}),
        ("whisper-large", "openai/whisper-large-v3", {}),
        ("image-classification", VISION, {}),
    ):
        recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
        recipe["model"] = model
        recipe["data"] |= data
        if name == "smollm2":  # fewer steps than for the real model
            recipe["training"]["max_steps"], recipe["sample_tokens"] = 8, 8
        (folder / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


def write_tagged(folder: Path) -> None:
    """Write sentences whose verdicts are tagged, as JSON lines and as a CoNLL-style file."""
    verdicts = {"warm", "witty", "wise", "dull", "thin", "lost"}
    rows = [
        {"tokens": text.split(), "ner_tags": ["B-X" if word in verdicts else "O" for word in text.split()]}
        for text, _ in REVIEWS
    ]
    write_lines(folder / "entities.jsonl", rows)
    sentences = ["".join(f"{word} {tag}\n" for word, tag in zip(*row.values(), strict=True)) for row in rows]
    (folder / "entities.conll").write_text("\n".join(sentences), encoding="utf-8")


# --- running a page's blocks ---------------------------------------------------------------------------------------


def save_file(example: Example) -> None:
    named = re.match(r"# ([\w-]+\.ya?ml)\n", example.parsed)
    if named:
        Path(named[1]).write_text(example.parsed, encoding="utf-8")


def run_commands(example: Example) -> None:
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            kind, arguments = words[0], words[1:]
            assert kind in COMMANDS, f"{example.path}: don't know how to check the command {line!r}"
            COMMANDS[kind](arguments)


def run_rankwise(arguments: list[str]) -> None:
    from typer.testing import CliRunner

    from rankwise.cli import app

    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"rankwise {shlex.join(arguments)}:\n{result.output}\n{result.exception!r}"


def check_make_target(arguments: list[str]) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    result = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def check_pip_extras(arguments: list[str]) -> None:
    offered = set(importlib.metadata.metadata("rankwise").get_all("Provides-Extra") or [])
    for extras in re.findall(r"\[([\w,-]+)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= offered, f"pip install {shlex.join(arguments)}"


def check_script(arguments: list[str]) -> None:
    """Check that a long-running script exists, and has all options that the page gives."""
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), f"python {shlex.join(arguments)}"
        return check_files(arguments[2:])
    script = ROOT / arguments[0]
    assert script.is_file(), f"python {shlex.join(arguments)}"
    options = {word.partition("=")[0] for word in arguments[1:] if word.startswith("--")}
    if options:
        told = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
        assert told.returncode == 0 and options <= set(re.findall(r"--[\w-]+", told.stdout)), told.stdout


def check_files(arguments: list[str]) -> None:
    """Check that the files in a framework's command are on the page. Frameworks have environments of their own."""
    missing = [word for word in arguments if word.endswith((".yaml", ".py")) and not Path(word).is_file()]
    assert not missing, shlex.join(arguments)


COMMANDS = {
    "axolotl": check_files,
    "llamafactory-cli": check_files,
    "swift": check_files,
    "rankwise": run_rankwise,
    "python": check_script,
    "make": check_make_target,
    "pip": check_pip_extras,
}

DOCUMENTATION = Sybil(
    parsers=[
        PythonCodeBlockParser(),
        CodeBlockParser(language="bash", evaluator=run_commands),
        CodeBlockParser(language="yaml", evaluator=save_file),
    ]
)
