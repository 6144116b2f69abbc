"""Real vLLM with exported adapters computes the same as Transformers with the adapter itself.

`make test-servers` installs vLLM in an environment of its own, because it needs other versions of shared packages.
``VLLM_PYTHON`` names that environment's interpreter. Without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from tiny import mix_ranks

PROMPT = [3, 17, 90, 41, 7]
TOKENS = 12
SERVER = """if True:
    import json, sys

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    if __name__ == "__main__":
        model, rank, prompt, count, *adapters = sys.argv[1:]
        server = LLM(
            model=model, dtype="float32", skip_tokenizer_init=True, max_model_len=64, enforce_eager=True,
            enable_lora=True, max_lora_rank=int(rank), max_loras=len(adapters),
        )
        sampling = SamplingParams(temperature=0.0, max_tokens=int(count), ignore_eos=True, detokenize=False)
        for number, adapter in enumerate(["", *adapters]):
            request = LoRARequest(f"adapter-{number}", number, adapter) if adapter else None
            inputs = {"prompt_token_ids": json.loads(prompt)}
            answer = server.generate([inputs], sampling, lora_request=request, use_tqdm=False)
            print("ANSWER", json.dumps(list(answer[0].outputs[0].token_ids)), flush=True)
"""


def base() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    config = LlamaConfig(
        **sizes,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def of_transformers(model: Any) -> list[int]:
    ids = list(PROMPT)
    for _ in range(TOKENS):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def of_vllm(folder: Path, model: Path, rank: int, adapters: list[Path]) -> list[list[int]]:
    """The greedy tokens of the base and of each adapter."""
    script = folder / "serve.py"  # a file, because vLLM starts processes that import it
    script.write_text(SERVER)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    words = [os.environ["VLLM_PYTHON"], script, model, rank, json.dumps(PROMPT), TOKENS, *adapters]
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=900, env=environment, cwd=folder
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert len(answers) == 1 + len(adapters), done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(answer.removeprefix("ANSWER")) for answer in answers]


@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="`make test-servers` installs vLLM")
def test_vllm_writes_the_tokens_of_transformers_with_mixed_ranks_padded_and_not(tmp_path: Path) -> None:
    import peft

    base().save_pretrained(tmp_path / "base")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    config = rw.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=targets)
    adapted = rw.get_peft_model(base(), config)
    mix_ranks(adapted, lambda number, path: number % 5)  # the first layer is q of layer 0, at rank 0
    adapted.save_pretrained(tmp_path / "adalora")

    generator = torch.Generator().manual_seed(3)
    patterns = {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 30}}
    lora = peft.LoraConfig(
        r=3, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "v_proj"], **patterns
    )
    of_peft = peft.get_peft_model(base(), lora)
    for name, parameter in of_peft.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    of_peft.save_pretrained(tmp_path / "lora")

    exported = []
    for adapter, to in (("adalora", "vllm"), ("adalora", "sglang"), ("lora", "vllm")):
        exported.append(tmp_path / f"{adapter}-{to}")
        notes = rw.export_adapter(exported[-1], tmp_path / adapter, to).notes  # type: ignore[arg-type]
    assert "--max-lora-rank 16 " in notes[0]
    plain, mixed, padded, patterned = of_vllm(tmp_path, tmp_path / "base", 16, exported)
    assert plain == of_transformers(base())
    assert mixed == padded == of_transformers(adapted.eval())
    assert patterned == of_transformers(of_peft.eval())
    assert len({tuple(plain), tuple(mixed), tuple(patterned)}) == 3
