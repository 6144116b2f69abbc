"""axolotl, LLaMA-Factory and ms-swift adapt ranks by their own configuration, from training to the merged model.

`make test-frameworks` installs each in an environment of its own. ``FRAMEWORKS_VENV`` names the folder that holds
these, and ``FRAMEWORKS`` may name the frameworks to test. Without the folder these tests are skipped.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from framework_world import ALPHA, FRAMEWORKS, RANK, STEPS, TARGET, Framework, World

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("FRAMEWORKS_VENV" not in os.environ, reason="`make test-frameworks` installs them"),
]
LAYERS = 14  # layers of the tiny Llama


@pytest.fixture(scope="module", params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Framework:
    if request.param not in os.environ.get("FRAMEWORKS", request.param).split():
        pytest.skip(f"{request.param} was not asked for")
    made = FRAMEWORKS[request.param](World.make(tmp_path_factory.mktemp("world")))
    if not made.bin.is_dir():
        pytest.skip(f"{made.name} is not installed in {made.bin.parent}")
    return made


@pytest.fixture(scope="module")
def trained(framework: Framework, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(framework.name)
    done = framework.train(folder)
    assert done.code == 0, done.told[-6000:]
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def factors_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def ranks_of(folder: Path) -> list[int]:
    return [len(value) for name, value in factors_of(folder).items() if "lora_A" in name]


def check_target(framework: Framework, folder: Path) -> None:
    """The budget counts parameters. A remainder that is too small for any rank stays unused."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(framework.world.model)
    wide, heads = config.hidden_size, config.num_key_value_heads * config.head_dim
    sizes = {"k_proj": wide + heads, "v_proj": wide + heads, "q_proj": 2 * wide, "o_proj": 2 * wide}
    whole = config.num_hidden_layers * (sum(sizes.values()) + 3 * (wide + config.intermediate_size))
    held = sum(value.numel() for value in factors_of(folder).values())
    assert TARGET * whole - 4 * wide <= held <= TARGET * whole


def log_of(folder: Path) -> list[dict[str, float]]:
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [record for record in state["log_history"] if "loss" in record]


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 51).view(4, 12)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def base(framework: Framework) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(framework.world.model, dtype=torch.float32)


def test_training_ends_at_the_target_with_a_plain_lora_adapter(framework: Framework, trained: Path) -> None:
    check_target(framework, trained / "out")
    ranks, config = ranks_of(trained / "out"), config_of(trained / "out")
    assert len(set(ranks)) > 1 and max(ranks) <= RANK
    assert config["peft_type"] == "LORA" and config["r"] == max(ranks)
    assert config["lora_alpha"] / config["r"] == pytest.approx(ALPHA / RANK)
    log = log_of(trained / "out")
    assert log[-1]["loss"] < log[0]["loss"] / 2
    budgets = [record["budget"] for record in log]
    assert RANK * LAYERS >= budgets[0] > budgets[-1] and budgets == sorted(budgets, reverse=True)


def test_the_report_reads_the_frameworks_files(trained: Path) -> None:
    from typer.testing import CliRunner

    from rankwise.cli import app

    page = trained / "report.html"
    result = CliRunner().invoke(app, ["report", str(trained / "out"), "-o", str(page)])
    assert result.exit_code == 0, result.output
    assert page.stat().st_size > 100_000
    assert (trained / "out" / "rank_history.json").is_file()


def test_the_frameworks_own_merge_computes_the_same_as_the_adapter(
    framework: Framework, trained: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done, folder = framework.merge(trained)
    assert done.code == 0, done.told[-6000:]
    merged = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    plain = logits(base(framework))
    assert not torch.allclose(merged, plain, atol=0.1)
    for load in (PeftModel.from_pretrained, rw.PeftModel.from_pretrained):
        adapted = logits(load(base(framework), trained / "out"))
        torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_between_cuts_computes_the_same(framework: Framework, trained: Path) -> None:
    from peft import PeftModel

    middle = trained / "out" / f"checkpoint-{STEPS // 2}"
    assert len(ranks_of(middle)) == LAYERS
    halfway = logits(PeftModel.from_pretrained(base(framework), middle))
    ours = logits(rw.PeftModel.from_pretrained(base(framework), middle))
    torch.testing.assert_close(halfway, ours, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(
    framework: Framework, trained: Path, tmp_path: Path
) -> None:
    checkpoint = trained / "out" / f"checkpoint-{STEPS // 2}"
    done = framework.train(tmp_path, resume_from_checkpoint=str(checkpoint))
    assert done.code == 0, done.told[-6000:]
    names = ("adapter_model.safetensors", "rank_history.json")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (trained / "out" / name).read_bytes(), name
    resumed, whole = log_of(tmp_path / "out"), log_of(trained / "out")
    assert [record["loss"] for record in resumed] == [record["loss"] for record in whole]


def test_dpo_starts_at_ln_2_and_ends_at_the_target(framework: Framework, tmp_path: Path) -> None:
    done = framework.train(tmp_path, dpo=True)
    assert done.code == 0, done.told[-6000:]
    log = log_of(tmp_path / "out")
    assert float(log[0]["loss"]) == pytest.approx(math.log(2), abs=1e-4)
    assert abs(float(log[-1]["loss"]) - math.log(2)) > 1e-3
    check_target(framework, tmp_path / "out")


def test_a_misspelt_option_ends_the_run_before_the_model_is_read(
    framework: Framework, tmp_path: Path
) -> None:
    done = framework.train(tmp_path, options={"target": 3})
    wanted = "no option `target`; it has target_r, tinit, tfinal, deltaT. Did you mean 'target_r'?"
    assert done.code != 0 and wanted in done.told, done.told[-4000:]
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_target_above_the_rank_ends_the_run_before_the_model_is_read(
    framework: Framework, tmp_path: Path
) -> None:
    done = framework.train(tmp_path, options={"target_r": 9})
    name = "lora_r" if framework.name == "axolotl" else "lora_rank"
    assert done.code != 0 and f"`target_r`=9 is greater than `{name}`=8" in done.told, done.told[-4000:]


@pytest.mark.parametrize("framework", ["ms-swift"], indirect=True)
def test_a_plugin_without_its_callback_is_refused_and_does_not_train_plain_lora(
    framework: Framework, tmp_path: Path
) -> None:
    done = framework.train(tmp_path, callbacks=None)
    assert done.code != 0 and "would train plain LoRA. Add `callbacks: rankwise`" in done.told, done.told[
        -4000:
    ]


@pytest.mark.parametrize("framework", ["llama-factory"], indirect=True)
def test_two_processes_end_at_the_target(
    framework: Framework, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchrun = tmp_path / "bin" / "torchrun"  # PyTorch and its script are in the tests' environment
    torchrun.parent.mkdir()
    torchrun.write_text(f'#!/bin/sh\nexec "{framework.bin / "python"}" -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{torchrun.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    done = framework.train(tmp_path, ddp_backend="gloo")
    assert done.code == 0, done.told[-6000:]
    check_target(framework, tmp_path / "out")
