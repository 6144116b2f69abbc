"""Real adapters of a real model are saved while processes are killed and disks fill up."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import rankwise as rw
from tiny import llama

if os.name == "nt":
    pytest.skip("Windows has no SIGKILL and no limit on file sizes.", allow_module_level=True)

STATE = "training_state.safetensors"

# Everything in a saved adapter shows its version: values, ranks, step, history, and whether a run is unfinished.
SAVER = """
import errno, json, os, resource, sys, warnings
from pathlib import Path
import torch, rankwise as rw
from tiny import llama

warnings.simplefilter("ignore")
torch.set_num_threads(1)

def adapted():
    config = rw.AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=10, total_step=10**6, orth_reg_weight=0.0,
                              target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"],
                              init_lora_weights=True)
    return rw.get_peft_model(llama(num_hidden_layers=1), config)

def set_version(model, version):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.fill_(float(version))
        mask = model.rankwise_mask
        mask.fill_(True)
        mask[: 1 + version % 3] = False
        for pair, kept in zip(model._rankwise_controller.factors.pairs, mask.split(4)):
            pair.parameter("E").mul_(kept[:, None])
    controller = model._rankwise_controller
    controller.step = version
    controller.history.record(version, int(mask.sum()), [int(part.sum()) for part in mask.split(4)])

def save(model, folder, version):
    set_version(model, version)
    model.save_pretrained(folder, training_state=version % 2 == 0)

def loop(folder, first):
    os.fsync = lambda file: None  # slow, and of no matter to a kill
    model = adapted()
    version = first
    while True:
        save(model, folder, version)
        os.write(1, b"%d\\n" % version)
        version += 1

def starve(folder, limit):
    model = adapted()
    save(model, folder, 2)
    set_version(model, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    else:
        disk = os.statvfs(folder)
        (folder.parent / "ballast").write_bytes(bytes(disk.f_bavail * disk.f_frsize - 20000))
    for place in (folder, folder.parent / "new"):
        try:
            model.save_pretrained(place, training_state=True)
        except OSError as error:
            print(json.dumps([errno.errorcode[error.errno], str(error), sorted(os.listdir(folder)), place.exists()]))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    loaded = rw.PeftModel.from_pretrained(llama(num_hidden_layers=1), folder, is_trainable=True)
    assert loaded.allocation_state.step == 2 and float(loaded.lm_head.modules_to_save.default.weight.max()) == 2
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else:
        (folder.parent / "ballast").unlink()
    save(model, folder, 4)
    loaded = rw.PeftModel.from_pretrained(llama(num_hidden_layers=1), folder, is_trainable=True)
    assert loaded.allocation_state.step == 4
    print("recovered")

if len(sys.argv) > 1:
    starve(Path(sys.argv[1]), int(sys.argv[2]))
    sys.exit()
os.write(1, b"ready\\n")
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.write(1, b"%d\\n" % os.getpid())
        folder, first = json.loads(line)
        loop(Path(folder), first)
    os.waitpid(child, 0)
    os.write(1, b"end\\n")
"""


def started(command: list[str], **options: Any) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported everything, and starts other processes that save."""
    with started([sys.executable, "-c", SAVER], stdin=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin is not None and process.stdout is not None
        while (line := process.stdout.readline()) != "ready\n":  # other libraries may print first
            assert line, "The process that starts others has failed."
        try:
            yield process
        finally:  # the processes that it has started end with it
            os.killpg(process.pid, signal.SIGKILL)


def save_until_killed(server: subprocess.Popen[str], folder: Path, first: int, seconds: float) -> int:
    """Save versions in a loop, beginning with ``first``, and kill it. Return the last version that was surely saved."""
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps([str(folder), first]) + "\n")
    server.stdin.flush()
    process = int(server.stdout.readline())
    done = [server.stdout.readline()]  # the first save is done, so the folder exists
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    while (line := server.stdout.readline()) != "end\n":
        assert line, "The process that saves has failed."
        done.append(line)
    return int(done[-1])


def the_one_version(values: dict[str, Tensor]) -> int:
    """The number that fills the head and all factors except pruned ranks."""
    found = {float(each) for value in values.values() for each in value.flatten()} - {0.0}
    assert len(found) == 1, f"the adapter is a mix of versions: {sorted(found)}"
    return int(found.pop())


def whole_version(folder: Path) -> int:
    """The version in a folder, which must be the same for every reader and in every file."""
    import peft

    theirs = peft.PeftModel.from_pretrained(llama(num_hidden_layers=1), folder)
    shown = {
        n: p for n, p in theirs.named_parameters() if ("lora_" in n or "modules_to_save" in n) and p.numel()
    }
    version = the_one_version({name: p.detach() for name, p in shown.items() if "ranknum" not in name})
    ours = rw.PeftModel.from_pretrained(llama(num_hidden_layers=1), folder)
    assert version == the_one_version({n: p.detach() for n, p in ours.named_parameters() if "default" in n})
    assert ours.rank_history.records[-1].step == version
    pruned = 1 + version % 3
    assert [row.rank for row in ours.rank_summary().layers] == [4 - pruned, 4]
    assert (folder / STATE).is_file() == (version % 2 == 0)
    if version % 2 == 0:
        trained = rw.PeftModel.from_pretrained(llama(num_hidden_layers=1), folder, is_trainable=True)
        assert trained.allocation_state.step == version
        assert int((~trained.rankwise_mask).sum()) == pruned
    return version


def kill_and_load(server: subprocess.Popen[str], folder: Path, kills: int, seed: int) -> list[int]:
    pytest.importorskip("peft")
    rng, versions = random.Random(seed), []
    sure = 0
    for _ in range(kills):
        sure = save_until_killed(server, folder, sure + 1, rng.uniform(0, 0.12))
        versions.append(whole_version(folder))
        assert versions[-1] in (sure, sure + 1), f"{sure} was saved for sure, but {versions[-1]} is there"
        sure = versions[-1]
    return versions


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_forty_kills_while_saving_leave_a_whole_adapter(
    server: subprocess.Popen[str], tmp_path: Path
) -> None:
    versions = kill_and_load(server, tmp_path / "checkpoint-7", 40, seed=2)
    print(f"{len(versions)} kills survived, in {versions[-1]} saves")
    assert len(versions) == 40


def starved(before: list[str], folder: Path, limit: int) -> list[Any]:
    with started([*before, sys.executable, "-c", SAVER, str(folder), str(limit)]) as process:
        output = process.communicate()[0].splitlines()
    assert process.returncode == 0 and output[-1] == "recovered", output
    return [json.loads(line) for line in output if line.startswith("[")]


def check_told(told: list[Any], code: str, reason: str, folder: Path) -> None:
    assert len(told) == 2, told
    for (number, message, files, exists), place in zip(told, (folder, folder.parent / "new"), strict=True):
        assert number == code and reason in message and str(place) in message and "save again" in message
        assert exists == (place == folder)
        assert files == sorted(
            ["adapter_config.json", "adapter_model.safetensors", "rank_history.json", STATE]
        )


@pytest.mark.slow
def test_a_limit_on_file_sizes_is_reported_and_keeps_the_earlier_checkpoint_and_the_model(
    tmp_path: Path,
) -> None:
    check_told(starved([], tmp_path / "adapter", 6000), "EFBIG", "ulimit -f", tmp_path / "adapter")


@pytest.mark.slow
def test_a_full_disk_is_reported_and_keeps_the_earlier_checkpoint_and_the_model(
    small_disk: list[str], tmp_path: Path
) -> None:
    told = starved(small_disk, tmp_path / "adapter", 0)
    check_told(told, "ENOSPC", "the disk is full", tmp_path / "adapter")
