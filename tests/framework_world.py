"""axolotl, LLaMA-Factory and ms-swift as their users start them: by commands and YAML, each in its own environment.

``FRAMEWORKS_VENV`` names the folder that holds these environments. `make test-frameworks` creates it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from language_world import OPPOSITES, questions, save_language_model, write_lines

ROOT = Path(__file__).parent.parent


def added_lines(page: str) -> dict[str, Any]:
    """The lines that a documentation page adds to a framework's YAML: the last paragraph of its YAML."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    block = text.partition("```yaml\n")[2].partition("```")[0]
    return yaml.safe_load(block.rpartition("\n\n")[2])


STEPS = 24
RANK, ALPHA, TARGET = 8, 16, 3.0


@dataclass(frozen=True)
class World:
    """A tiny model, chats in each framework's format, and preference pairs."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @classmethod
    def make(cls, folder: Path) -> World:
        save_language_model(folder / "model", max_position_embeddings=512)
        wrong = [*list(OPPOSITES.values())[5:], *list(OPPOSITES.values())[:5]]
        chats, rows = [], []
        for number, row in enumerate(questions()):
            asked = {"role": "user", "content": row["question"]}
            answered = {"role": "assistant", "content": row["answer"]}
            chats.append({"messages": [asked, answered]})
            rows.append((asked, answered, {"role": "assistant", "content": f"it is {wrong[number % 12]}."}))
        write_lines(folder / "chats.jsonl", chats)
        write_lines(
            folder / "axolotl-pairs.jsonl",
            [{"conversation": [asked], "chosen": yes, "rejected": no} for asked, yes, no in rows],
        )
        write_lines(
            folder / "llama-factory-pairs.jsonl",
            [
                {"prompt": asked["content"], "chosen": yes["content"], "rejected": no["content"]}
                for asked, yes, no in rows
            ],
        )
        write_lines(
            folder / "ms-swift-pairs.jsonl",
            [{"messages": [asked, yes], "rejected_response": no["content"]} for asked, yes, no in rows],
        )
        return cls(folder)


@dataclass(frozen=True)
class Done:
    """The result of a command."""

    code: int
    told: str


class Framework:
    """How to configure and start one framework."""

    name: str

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def bin(self) -> Path:
        return Path(os.environ["FRAMEWORKS_VENV"]).resolve() / self.name / "bin"

    def run(self, command: list[str | Path], folder: Path) -> Done:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "AXOLOTL_DO_NOT_TRACK": "1",
            "WANDB_MODE": "disabled",
            "MODELSCOPE_CACHE": str(self.world.folder / "modelscope"),
        }
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=900
        )
        return Done(done.returncode, done.stdout + done.stderr)

    def write(self, folder: Path, config: Mapping[str, Any], name: str = "run.yaml") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
        return folder / name

    def train(
        self, folder: Path, *, dpo: bool = False, options: Mapping[str, Any] | None = None, **changes: Any
    ) -> Done:
        """Train in ``folder``, with the adapter in ``folder / "out"``. ``options`` are those of adaptive ranks."""
        raise NotImplementedError

    def merge(self, folder: Path) -> tuple[Done, Path]:
        """Merge ``folder / "out"`` with the framework's own command. Return the model's folder as well."""
        raise NotImplementedError


class Axolotl(Framework):
    name = "axolotl"

    def config(self, folder: Path, dpo: bool, options: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
        pairs = {"type": "chat_template.default", "split": "train", "field_messages": "conversation",
                 "field_chosen": "chosen", "field_rejected": "rejected"}  # fmt: skip
        data = {
            "path": str(self.world.folder / ("axolotl-pairs.jsonl" if dpo else "chats.jsonl")),
            "ds_type": "json",
            **(pairs if dpo else {"type": "chat_template"}),
        }
        return {
            "base_model": str(self.world.model),
            **({"rl": "dpo"} if dpo else {}),
            "datasets": [data],
            "chat_template": "tokenizer_default",
            "dataset_prepared_path": str(folder / "prepared"),
            "output_dir": str(folder / "out"),
            "adapter": "lora", "lora_r": RANK, "lora_alpha": ALPHA, "lora_target_linear": True,
            # Kernels for GPUs.
            "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False,
            "bf16": False, "fp16": False, "tf32": False,
            "sequence_len": 64, "micro_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": STEPS,
            "save_steps": STEPS // 2, "learning_rate": 0.01, "optimizer": "adamw_torch", "lr_scheduler": "constant",
            "logging_steps": 1, "seed": 3,
            **added_lines("axolotl.md"),
            "rankwise": dict(options),
            **changes,
        }  # fmt: skip

    def train(
        self, folder: Path, *, dpo: bool = False, options: Mapping[str, Any] | None = None, **changes: Any
    ) -> Done:
        file = self.write(folder, self.config(folder, dpo, options or {"target_r": TARGET}, changes))
        return self.run([self.bin / "python", "-m", "axolotl.cli.train", file], folder)

    def merge(self, folder: Path) -> tuple[Done, Path]:
        done = self.run([self.bin / "axolotl", "merge-lora", folder / "run.yaml"], folder)
        return done, folder / "out" / "merged"


class LlamaFactory(Framework):
    name = "llama-factory"

    def train(
        self, folder: Path, *, dpo: bool = False, options: Mapping[str, Any] | None = None, **changes: Any
    ) -> Done:
        tags = {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        }
        folder.mkdir(parents=True, exist_ok=True)
        told = {
            "chats": {
                "file_name": str(self.world.folder / "chats.jsonl"), "formatting": "sharegpt",
                "columns": {"messages": "messages"}, "tags": tags,
            },
            "pairs": {
                "file_name": str(self.world.folder / "llama-factory-pairs.jsonl"), "ranking": True,
                "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
            },
        }  # fmt: skip
        (folder / "dataset_info.json").write_text(json.dumps(told), encoding="utf-8")
        config = {
            "model_name_or_path": str(self.world.model),
            "stage": "dpo" if dpo else "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": RANK,
            "lora_alpha": ALPHA, "lora_dropout": 0.0, "lora_target": "all",
            "dataset_dir": str(folder), "dataset": "pairs" if dpo else "chats", "template": "chatml", "cutoff_len": 64,
            "output_dir": str(folder / "out"), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
            "max_steps": STEPS, "save_steps": STEPS // 2, "learning_rate": 0.01, "lr_scheduler_type": "constant",
            "logging_steps": 1, "report_to": "none", "overwrite_cache": True, "dataloader_num_workers": 0, "seed": 3,
            **added_lines("llama-factory.md"),
            "rankwise": dict(options or {"target_r": TARGET}),
            **changes,
        }  # fmt: skip
        file = self.write(folder, config)
        command = [self.bin / "python", "-m", "rankwise.integrations.llama_factory", "train", file]
        return self.run(command, folder)

    def merge(self, folder: Path) -> tuple[Done, Path]:
        config = {
            "model_name_or_path": str(self.world.model),
            "adapter_name_or_path": str(folder / "out"),
            "template": "chatml",
            "export_dir": str(folder / "merged"),
            "infer_dtype": "float32",
        }
        file = self.write(folder, config, "export.yaml")
        return self.run([self.bin / "llamafactory-cli", "export", file], folder), folder / "merged"


class MsSwift(Framework):
    name = "ms-swift"

    def train(
        self, folder: Path, *, dpo: bool = False, options: Mapping[str, Any] | None = None, **changes: Any
    ) -> Done:
        folder.mkdir(parents=True, exist_ok=True)
        given = ", ".join(f"{name}={value!r}" for name, value in (options or {"target_r": TARGET}).items())
        (folder / "ranks.py").write_text(
            f"from rankwise.integrations.ms_swift import adapt_ranks\n\nadapt_ranks({given})\n",
            encoding="utf-8",
        )
        config = {
            "model": str(self.world.model), "model_type": "llama", "template": "chatml",
            **({"rlhf_type": "dpo"} if dpo else {}),
            "dataset": str(self.world.folder / ("ms-swift-pairs.jsonl" if dpo else "chats.jsonl")),
            "tuner_type": "lora", "lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0,
            "target_modules": "all-linear", "torch_dtype": "float32", "max_length": 64,
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": STEPS,
            "save_steps": STEPS // 2, "learning_rate": 0.01, "lr_scheduler_type": "constant", "logging_steps": 1,
            "output_dir": str(folder / "out"), "add_version": False, "report_to": "none", "split_dataset_ratio": 0,
            "dataloader_num_workers": 0, "seed": 3,
            **added_lines("ms-swift.md"),
            **changes,
        }  # fmt: skip
        file = self.write(folder, {name: value for name, value in config.items() if value is not None})
        return self.run([self.bin / "swift", "rlhf" if dpo else "sft", file], folder)

    def merge(self, folder: Path) -> tuple[Done, Path]:
        merged = folder / "merged"
        command = [self.bin / "swift", "export", "--adapters", folder / "out", "--merge_lora", "true"]
        return self.run([*command, "--output_dir", merged], folder), merged


FRAMEWORKS = {each.name: each for each in (Axolotl, LlamaFactory, MsSwift)}
