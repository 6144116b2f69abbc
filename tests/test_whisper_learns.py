"""The promise of the recipe for Whisper tiny: real weights learn a voice that they mishear at first."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rankwise as rw
from rankwise.recipes import load_recipe, train
from rankwise.recipes.tasks.speech_recognition import task

ROOT = Path(__file__).parent.parent
MODEL = ROOT.parent / "shared" / "models" / "whisper-tiny.en"
HEARD_WHOLE = 16


@pytest.mark.slow
def test_whisper_learns_a_voice_that_it_mishears(tmp_path: Path) -> None:
    """The word error rate falls at least by half, also with the ordinary model and its window of thirty seconds."""
    if not MODEL.is_dir():
        pytest.skip(f"there are no Whisper weights in {MODEL}")
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    script = ROOT / "recipes" / "speech" / "make_data.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "speech")], check=True)
    overrides = [f"model={MODEL}", f"data.train={tmp_path}/speech/manifest.csv", f"output={tmp_path}/adapter"]
    recipe = load_recipe(ROOT / "recipes" / "whisper-tiny.yaml", overrides)
    result = train(recipe)

    assert json.loads((result.folder / "results.json").read_text())["finished"]
    assert result.before["wer"] > 0.3
    assert result.after["wer"] < 0.5 * result.before["wer"]
    assert heard_whole(overrides, result.folder) < 0.5 * result.before["wer"]


def heard_whole(overrides: list[str], folder: Path) -> float:
    """The word error rate of the saved adapter on the ordinary model, whose window is thirty seconds."""
    from transformers import AutoProcessor, WhisperForConditionalGeneration

    recipe = load_recipe(ROOT / "recipes" / "whisper-tiny.yaml", [*overrides, "data.max_seconds=30"])
    data = task.read_data(recipe)
    base = WhisperForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32)
    model = rw.PeftModel.from_pretrained(base, str(folder)).eval()
    arguments, _ = task.trainer_arguments(recipe, data, AutoProcessor.from_pretrained(folder), model)
    clips = [arguments["eval_dataset"][i] for i in range(HEARD_WHOLE)]
    batch = arguments["data_collator"](clips)
    assert batch["input_features"].shape[-1] == 3000
    with torch.no_grad():
        written = model.generate(batch["input_features"]).numpy()
    return float(arguments["compute_metrics"](_Prediction(written, batch["labels"].numpy()))["wer"])


class _Prediction:
    def __init__(self, predictions: object, label_ids: object) -> None:
        self.predictions, self.label_ids = predictions, label_ids
