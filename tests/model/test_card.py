"""The model card: what the hub reads in it, and who wrote it; and pushing to a local substitute for the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load, load_file

import rankwise as rw
from fake_hub import fake_hub
from rankwise.recipes import load_recipe, train
from rankwise.storage.card import is_own
from recipe_world import save_tiny_model, write_recipe, write_table
from tiny import llama


@pytest.fixture
def model() -> rw.PeftModel:
    base = llama()
    base.config._name_or_path = "someone/tiny-llama"
    config = rw.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted: rw.PeftModel = rw.get_peft_model(base, config)
    return adapted


def test_the_hub_finds_the_base_model_and_the_library_and_no_license(model, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    model.save_pretrained(tmp_path)
    assert model.create_or_update_model_card(tmp_path, tags=["poems"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/tiny-llama" and card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation" and card.data.license is None
    assert card.data.tags == ["rankwise", "lora", "base_model:adapter:someone/tiny-llama", "poems"]
    assert "LlamaForCausalLM.from_pretrained('someone/tiny-llama')" in card.text


def test_rankwises_card_is_replaced_and_a_persons_never(model, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    assert model.create_or_update_model_card(tmp_path)
    first = readme.read_text()
    assert model.create_or_update_model_card(tmp_path, tags=["new"]) and readme.read_text() != first
    readme.write_bytes(readme.read_bytes().replace(b"\n", b"\r\n"))  # as git does on Windows
    assert is_own(readme.read_text()) and model.create_or_update_model_card(tmp_path)
    for theirs in (first.replace("## License", "license: mit"), "# By hand\n", ""):
        readme.write_text(theirs)
        assert not model.create_or_update_model_card(tmp_path)
        assert readme.read_text() == theirs
    readme.write_bytes(b"\xff\xfe not UTF-8")
    assert not model.create_or_update_model_card(tmp_path)


def test_a_card_gives_metrics_and_no_local_path(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    write_table(tmp_path / "reviews.csv")
    bert = save_tiny_model(tmp_path / "bert")
    result = train(load_recipe(write_recipe(tmp_path, bert)), console=Console(file=StringIO()))
    card = ModelCard.load(result.folder / "README.md")
    assert str(tmp_path) not in card.content and card.data.base_model is None
    measured = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert measured["accuracy"] == result.after["accuracy"] and measured["f1"] == result.after["macro_f1"]
    assert card.data.metrics == ["accuracy", "f1"] and card.data.pipeline_tag == "text-classification"
    assert "12 held-out examples of reviews.csv" in card.text


def test_an_adapter_goes_to_the_hub_and_comes_back_and_a_changed_card_stays_there(tmp_path: Path) -> None:
    with fake_hub() as hub:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join([str(Path(rw.__file__).parents[1]), str(Path(__file__).parents[1])]),
        }  # fmt: skip
        script = Path(__file__).parents[1] / "fake_hub.py"
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path / "saved"), "someone/poems"],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, f"{done.stderr}\n{hub.asked}"
    main, second = hub.repos["someone/poems"]["main"], hub.repos["someone/poems"]["second"]
    assert set(main) == set(second) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    there = load(main["adapter_model.safetensors"])
    assert set(there) == set(saved) and all(torch.equal(there[name], saved[name]) for name in saved)
    assert b"MIT, said by me" in main["README.md"] and b"- poems" in main["README.md"]
    assert b"MIT" not in second["README.md"] and is_own(second["README.md"].decode())
