"""Saves that are killed, interrupted, crowded or starved must leave the old version or the new one."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import rankwise.files.atomic as atomic
import rankwise.files.stage as stage
from rankwise.files.atomic import read_folder, recover, write_file, write_folder
from rankwise.files.locks import only_one
from rankwise.files.stage import HOST

needs_signals = pytest.mark.skipif(
    os.name == "nt", reason="Windows has no SIGKILL and no limit on file sizes."
)

CONFIG, WEIGHTS, STATE = "adapter_config.json", "adapter_model.safetensors", "training_state.safetensors"
OWNED = (CONFIG, WEIGHTS, STATE)

# The module without its package's other imports: it starts quickly, and can be forked safely.
LOAD = """
import errno, json, os, pathlib, signal, sys, types
package = types.ModuleType("rankwise")
package.__path__ = [str(pathlib.Path(sys.argv[1]).parents[1])]
sys.modules["rankwise"] = package
from rankwise.files import atomic
"""

SAVER = """
def refuse(*args, **kwargs):
    raise OSError(errno.EPERM, "not on this file system")

def save(folder, version):
    def write(new):
        for name in owned if version % 2 else owned[:2]:
            (new / name).write_text(json.dumps({"version": version}))

    owned = ["adapter_config.json", "adapter_model.safetensors", "training_state.safetensors"]
    atomic.write_folder(folder, write, owned)

def save_file(path, version):
    atomic.write_file(path, f"{version} " * 5000)

def die_before(change):
    def count(event, args):
        nonlocal change
        if event in changes:
            change -= 1
            if not change:
                os.kill(os.getpid(), signal.SIGKILL)

    changes = {"os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "open"}
    sys.addaudithook(count)

def run(path, mode, first, die_at):
    os.fsync = lambda file: None  # slow, and of no matter to a kill
    if mode in ("no hard links", "no links"):
        os.link = refuse
    if mode in ("no symbolic links", "no links"):
        os.symlink = refuse
    if die_at:
        die_before(die_at)
    for version in range(first, first + 1 if die_at else 10**9):
        (save_file if mode == "file" else save)(pathlib.Path(path), version)
        os.write(1, b"%d\\n" % version)

for line in sys.stdin:
    child = os.fork()
    if not child:
        os.write(1, b"%d\\n" % os.getpid())
        run(*json.loads(line))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    os.write(1, b"end %d\\n" % status)
"""


class Saver:
    """Runs processes that save and are killed."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self.server = server

    def start(self, path: Path, mode: str, first: int, die_at: int) -> int:
        """Start saving versions, beginning with ``first``. Return the process's number."""
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps([str(path), mode, first, die_at]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def end(self) -> tuple[list[int], int]:
        """Wait for the end of the process. Return the versions that it had saved, and its status."""
        assert self.server.stdout is not None
        lines = []
        while not (line := self.server.stdout.readline()).startswith("end"):
            assert line, "The process that saves has failed."
            lines.append(line)
        return [int(line) for line in lines], int(line.split()[1])

    def save_once(self, path: Path, mode: str, version: int, die_at: int) -> bool:
        """Save, but die before the change ``die_at`` to the disk. Return whether the save was done before that."""
        self.start(path, mode, version, die_at)
        status = self.end()[1]
        assert status in (0, signal.SIGKILL)
        return status == 0

    def save_until_killed(self, path: Path, mode: str, first: int, meanwhile: Callable[[], object]) -> int:
        """Save in a loop until ``meanwhile`` returns. Return the last version that was surely saved."""
        process = self.start(path, mode, first, die_at=0)
        try:
            meanwhile()
        finally:
            os.kill(process, signal.SIGKILL)
            done = self.end()[0]
        return max(done, default=first - 1)


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory if there is one: hundreds of kills need no disk, and a disk is slow."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def saver() -> Iterator[Saver]:
    command = [sys.executable, "-I", "-S", "-c", LOAD + SAVER, atomic.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield Saver(server)
        assert server.stdin is not None
        server.stdin.close()


def save(folder: Path, version: int) -> None:
    def write(new: Path) -> None:
        for name in OWNED if version % 2 else OWNED[:2]:
            (new / name).write_text(json.dumps({"version": version}))

    write_folder(folder, write, OWNED)


def read(folder: Path) -> dict[str, int]:
    """A reader's view: the version in each file that can be opened."""
    found = {}
    for name in OWNED:
        try:
            found[name] = json.loads((folder / name).read_text())["version"]
        except FileNotFoundError:
            pass
    return found


def whole(version: int) -> dict[str, int]:
    """A reader's view of a whole version; 0 stands for no version."""
    names = OWNED[: (0 if version == 0 else 3 if version % 2 else 2)]
    return dict.fromkeys(names, version)


def assert_tidy(folder: Path) -> None:
    leftovers = [path for place in (folder, folder.parent) for path in place.glob(".rankwise-*")]
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    assert leftovers == [] and links == []


def kill_many(saver: Saver, folder: Path, mode: str, check: Callable[[int, int], None]) -> None:
    """Kill a process that saves in a loop, a hundred times. ``check`` gets the versions that it may have left."""
    chance = random.Random(0)
    done = 0
    for _ in range(100):
        done = saver.save_until_killed(folder, mode, done + 1, lambda: time.sleep(chance.uniform(0, 0.01)))
        check(done, done + 1)
        done = max(read(folder).values(), default=0)
    assert done > 1


@needs_signals
@pytest.mark.parametrize("mode", ["links", "no hard links"])
def test_a_hundred_kills_leave_the_old_or_the_new_version_for_any_reader(
    saver: Saver, quick_path: Path, mode: str
) -> None:
    folder = quick_path / "adapter"

    def check(old: int, new: int) -> None:
        assert read(folder) in (whole(old), whole(new))

    kill_many(saver, folder, mode, check)
    save(folder, 1)
    assert read(folder) == whole(1)
    assert_tidy(folder)


@needs_signals
def test_a_hundred_kills_without_symbolic_links_never_mix_and_are_recovered(
    saver: Saver, quick_path: Path
) -> None:
    folder = quick_path / "adapter"

    def check(old: int, new: int) -> None:
        seen = read(folder)
        assert len(set(seen.values())) <= 1, "a mix of two versions"
        assert CONFIG not in seen or seen in (whole(old), whole(new)), "a part of a version that looks whole"
        recover(folder)
        assert read(folder) in (whole(old), whole(new))

    kill_many(saver, folder, "no symbolic links", check)


@needs_signals
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("mode", ["links", "no hard links", "no symbolic links", "no links"])
def test_a_kill_before_any_single_change_to_the_disk_leaves_one_version(
    saver: Saver, quick_path: Path, mode: str, before: int
) -> None:
    for die_at in range(1, 1000):
        folder = quick_path / str(die_at) / "adapter"
        folder.parent.mkdir()
        if before:
            save(folder, before)
            (folder / "checkpoint-1").mkdir()
        done = saver.save_once(folder, mode, before + 1, die_at)

        seen = read(folder)
        either = (whole(before), whole(before + 1))
        if mode in ("links", "no hard links"):
            assert seen in either, die_at
        assert CONFIG not in seen or seen in either, die_at
        assert len(set(seen.values())) <= 1, die_at
        recover(folder)
        assert read(folder) in either, die_at
        save(folder, before + 2)
        assert read(folder) == whole(before + 2), die_at
        assert_tidy(folder)
        if done:
            break
    assert die_at > (40 if before else 10)


@needs_signals
@pytest.mark.parametrize("mode", ["links", "no hard links"])
def test_kills_of_saves_that_tidy_after_a_kill_lose_nothing(
    saver: Saver, quick_path: Path, mode: str
) -> None:
    folder = quick_path / "adapter"
    save(folder, 1)
    chance = random.Random(0)
    for version in range(2, 102):
        before = read(folder)
        saver.save_once(folder, mode, version, die_at=chance.randint(1, 120))
        assert read(folder) in (before, whole(version))
    recover(folder)
    assert_tidy(folder)


@needs_signals
@pytest.mark.parametrize("mode", ["links", "no hard links", "no symbolic links"])
def test_readers_during_saves_always_get_one_whole_version(saver: Saver, quick_path: Path, mode: str) -> None:
    folder = quick_path / "adapter"
    save(folder, 1)
    seen = []

    def meanwhile() -> None:
        start = time.monotonic()
        while time.monotonic() < start + 0.3 or (len(set(seen)) < 10 and time.monotonic() < start + 20):
            found = read_folder(folder, OWNED, read_whole)
            assert found == whole(found[CONFIG])
            seen.append(found[CONFIG])

    saver.save_until_killed(folder, mode, 2, meanwhile)
    assert seen == sorted(seen) and len(set(seen)) >= 10


def read_whole(folder: Path) -> dict[str, int]:
    found = read(folder)
    if CONFIG not in found:
        raise FileNotFoundError(CONFIG)
    return found


def test_a_read_that_a_save_crosses_is_repeated(tmp_path: Path) -> None:
    save(tmp_path, 1)
    versions = iter([3, 5])

    def slow(folder: Path) -> tuple[str, str]:
        config = (folder / CONFIG).read_text()
        for version in versions:
            save(folder, version)
            break
        return config, (folder / WEIGHTS).read_text()

    assert read_folder(tmp_path, OWNED, slow) == ('{"version": 5}', '{"version": 5}')


def test_a_read_that_fails_while_a_save_ends_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without links, the files are away for a moment, and may be back when the reader looks for the save."""
    (tmp_path / ".rankwise-stage").mkdir()
    away = tmp_path / ".rankwise-stage" / CONFIG
    away.write_text("saved")

    def stages_at_the_end(folder: Path) -> list[Path]:
        if away.exists():
            os.replace(away, folder / CONFIG)
            away.parent.rmdir()
        return stage.stages(folder)

    monkeypatch.setattr(atomic, "recover", lambda folder: None)
    monkeypatch.setattr(atomic, "stages", stages_at_the_end)
    assert read_folder(tmp_path, [CONFIG], lambda folder: (folder / CONFIG).read_text()) == "saved"


@needs_signals
def test_a_read_that_misses_a_file_while_it_takes_the_place_of_a_link_is_repeated(tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.write_text("saved")
    (tmp_path / STATE).symlink_to(new)

    def read_optional(folder: Path) -> str | None:
        if new.exists():  # what a reader meets that has followed the link just before
            os.replace(new, folder / STATE)
            return None
        return (folder / STATE).read_text()

    assert read_folder(tmp_path, [STATE], read_optional) == "saved"


def test_a_reader_gets_an_error_if_files_change_faster_than_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_READS", 3)
    save(tmp_path, 1)
    with pytest.raises(OSError, match="was saved to 3 times while it was being read"):
        read_folder(tmp_path, [CONFIG], lambda folder: save(folder, 1))
    with pytest.raises(KeyError):
        read_folder(tmp_path, [CONFIG], lambda folder: {}["an error of its own"])


def test_threads_that_save_to_one_folder_take_turns(quick_path: Path) -> None:
    threads = [
        threading.Thread(target=lambda start=start: [save(quick_path, start + 2 * i) for i in range(20)])
        for start in (101, 202, 303)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found = read_folder(quick_path, OWNED, read)
        assert not found or found == whole(found[CONFIG])
    found = read(quick_path)
    assert found == whole(found[CONFIG])
    assert_tidy(quick_path)


@needs_signals
def test_a_save_uses_no_stage_that_another_process_is_still_removing_as_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open, real_remove = stage.open_lock, shutil.rmtree
    opened: list[Path] = []
    removing: list[Path] = []

    def open_and_be_overtaken(path: Path) -> int:
        opened.append(path)
        lock = real_open(path)
        if len(opened) == 1:  # the other process cleans up before this one has locked its new stage
            monkeypatch.setattr(shutil, "rmtree", lambda path, **options: removing.append(Path(path)))
            stage.clean(tmp_path)
            monkeypatch.setattr(shutil, "rmtree", real_remove)
        return lock

    def write(new: Path) -> None:
        (new / CONFIG).write_text(json.dumps({"version": 2}))
        (new / WEIGHTS).write_text(json.dumps({"version": 2}))
        for path in removing:
            real_remove(path)

    monkeypatch.setattr(stage, "open_lock", open_and_be_overtaken)
    write_folder(tmp_path, write, OWNED)
    assert removing
    assert read(tmp_path) == whole(2)
    assert_tidy(tmp_path)


@needs_signals
def test_a_save_waits_while_another_process_replaces_files_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    thread = threading.Thread(target=save, args=(tmp_path, 2))
    with only_one(tmp_path, patience=1):
        thread.start()
        thread.join(0.2)
        assert read(tmp_path) == whole(1)
        monkeypatch.setattr(stage, "PATIENCE", 0.05)
        with pytest.raises(
            TimeoutError, match="another process is replacing its files. The previous version"
        ):
            save(tmp_path, 3)
    thread.join()
    assert read(tmp_path) == whole(2)
    assert_tidy(tmp_path)


def test_files_written_by_others_during_a_save_are_kept(tmp_path: Path) -> None:
    """In a distributed run the other processes write into the folder that the first process saves to."""
    for folder in (tmp_path / "new", tmp_path / "old"):
        if folder.name == "old":
            save(folder, 1)

        def write(new: Path, folder: Path = folder) -> None:
            (new / CONFIG).write_text(json.dumps({"version": 2}))
            folder.mkdir(exist_ok=True)
            (folder / "rng_state_1.pth").write_text("rank 1")

        write_folder(folder, write, OWNED)
        assert sorted(path.name for path in folder.iterdir()) == [CONFIG, "rng_state_1.pth"]
        assert_tidy(folder)


def test_other_files_and_folders_stay_the_same_files(tmp_path: Path) -> None:
    folder = tmp_path / "output"
    save(folder, 1)
    (folder / "README.md").write_text("mine")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / CONFIG).write_text("a checkpoint's")
    (folder / "latest").symlink_to("checkpoint-5")
    others = ["README.md", "checkpoint-5", f"checkpoint-5/{CONFIG}", "."]
    before = [os.stat(folder / name).st_ino for name in others]

    save(folder, 2)

    assert read(folder) == whole(2)
    assert [os.stat(folder / name).st_ino for name in others] == before
    assert (folder / f"checkpoint-5/{CONFIG}").read_text() == "a checkpoint's"
    assert os.readlink(folder / "latest") == "checkpoint-5"
    assert list(folder.glob(".rankwise-*")) == []


def test_files_in_sub_folders_are_part_of_the_same_instant(tmp_path: Path) -> None:
    def write(new: Path, version: int) -> None:
        (new / "french").mkdir()
        (new / CONFIG).write_text(str(version))
        (new / "french" / CONFIG).write_text(str(version))

    owned = [CONFIG, f"french/{CONFIG}", f"german/{CONFIG}"]
    (tmp_path / "german").mkdir()
    (tmp_path / "german" / CONFIG).write_text("stale")
    for version in (1, 2):
        write_folder(tmp_path, lambda new, version=version: write(new, version), owned)
        assert [(tmp_path / name).read_text() for name in owned[:2]] == [str(version)] * 2
    assert not (tmp_path / "german" / CONFIG).exists()
    assert_tidy(tmp_path)


def test_a_link_to_a_folder_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    for version in (1, 2):  # the target is missing at first
        save(tmp_path / "link", version)
        assert os.readlink(tmp_path / "link") == "target"
        assert read(tmp_path / "target") == whole(version)


@pytest.mark.parametrize("name", [".", "adapter/", "./adapter", "../here/adapter", "deep/er/adapter"])
def test_relative_names_and_the_current_folder_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for version in (1, 2):
        save(Path(name), version)
        assert read(tmp_path / "here" / name) == whole(version)
        assert read(Path(name)) == whole(version)
    assert os.path.samefile(os.getcwd(), tmp_path / "here")


def test_a_file_that_is_a_link_is_replaced_and_its_target_is_kept(tmp_path: Path) -> None:
    """In a download cache, a model's files are links to contents that other folders share."""
    (tmp_path / "blob").write_text(json.dumps({"version": 1}))
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / CONFIG).symlink_to("../blob")
    save(tmp_path / "snapshot", 2)
    assert read(tmp_path / "snapshot") == whole(2)
    assert (tmp_path / "blob").read_text() == json.dumps({"version": 1})


@needs_signals
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_plain_writing(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save(tmp_path / "made", 1)
        write_folder(tmp_path / "made", lambda new: (new / "from safetensors").touch(mode=0o600))
        write_file(tmp_path / "file", "1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o777 & ~umask
    for name in (CONFIG, "from safetensors"):
        assert stat.S_IMODE((tmp_path / "made" / name).stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


@needs_signals
def test_permissions_that_the_user_has_set_are_kept(tmp_path: Path) -> None:
    save(tmp_path / "private", 1)
    write_file(tmp_path / "file", "1")
    modes = {tmp_path / "private": 0o700, tmp_path / "private" / WEIGHTS: 0o600, tmp_path / "file": 0o640}
    for path, mode in modes.items():
        path.chmod(mode)
    save(tmp_path / "private", 2)
    write_file(tmp_path / "file", "2")
    assert {path: stat.S_IMODE(path.stat().st_mode) for path in modes} == modes


@needs_signals
def test_leftovers_of_dead_processes_go_and_those_of_the_living_stay(saver: Saver, quick_path: Path) -> None:
    folder = quick_path / "adapter"
    save(folder, 1)
    saver.save_once(folder, "links", 2, die_at=25)
    (dead,) = folder.glob(".rankwise-*")

    def write(new: Path) -> None:
        (living,) = folder.glob(".rankwise-*")
        assert living == new.parent and living != dead
        recover(folder)
        save(folder, 3)
        assert new.is_dir()
        (new / CONFIG).write_text(json.dumps({"version": 4}))

    write_folder(folder, write, OWNED)
    assert read(folder) == {CONFIG: 4}
    assert_tidy(folder)


@needs_signals
def test_leftovers_of_a_killed_first_save_are_removed_by_the_next_save(
    saver: Saver, quick_path: Path
) -> None:
    saver.save_once(quick_path / "checkpoint-100", "links", 1, die_at=6)
    assert [path.name[:10] for path in quick_path.iterdir()] == [".rankwise-"]
    save(quick_path / "checkpoint-200", 1)
    assert [path.name for path in quick_path.iterdir()] == ["checkpoint-200"]


def test_leftovers_from_another_machine_are_kept_for_a_day(tmp_path: Path) -> None:
    stage = tmp_path / ".rankwise-another-machine-00ff00ff"
    (stage / "new").mkdir(parents=True)
    (stage / "lock").touch()
    save(tmp_path, 1)
    assert stage.exists()
    for path in (stage / "new", stage):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    save(tmp_path, 2)
    assert not stage.exists()


def test_a_folder_from_elsewhere_cannot_make_recovery_touch_other_files(tmp_path: Path) -> None:
    """A folder from an archive may contain files that look like leftovers and lead out of the folder."""
    secret, home, folder = tmp_path / "secret", tmp_path / "home", tmp_path / "adapter"
    for path in (secret, home, folder):
        path.mkdir()
    (secret / CONFIG).write_text("secret")
    for number in range(4):
        stage = folder / f".rankwise-{HOST}-0000000{number}"
        (stage / "old" / "out").mkdir(parents=True)
        (stage / "old" / CONFIG).write_text("")
        (stage / "old" / "out" / "keys").write_text("")
        if number == 0:  # the new files are elsewhere
            (stage / "new").symlink_to(secret)
            (stage / "current").symlink_to("new")
            (folder / CONFIG).symlink_to(f"{stage.name}/current/{CONFIG}")
        if number == 1:  # the files shown are elsewhere, too
            (stage / "current").symlink_to(secret)
        if number == 2:  # the lock is elsewhere, too
            (stage / "lock").symlink_to(home / "lock")
    (folder / "out").symlink_to(home)

    recover(folder)

    assert list(home.iterdir()) == [] and [path.name for path in secret.iterdir()] == [CONFIG]
    assert not (folder / CONFIG).exists() or (folder / CONFIG).read_text() != "secret"


def test_an_error_of_the_writer_comes_through_and_changes_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path / "old", tmp_path / "missing"):
        if folder.name == "old":
            save(folder, 1)
        for error in (ValueError("rank 3"), KeyboardInterrupt()):

            def write(new: Path, error: BaseException = error) -> None:
                (new / CONFIG).write_text("half")
                raise error

            with pytest.raises(type(error)):
                write_folder(folder, write, OWNED)
    assert read(tmp_path / "old") == whole(1)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert_tidy(tmp_path / "old")


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failure_of_any_single_step_leaves_one_version(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, links: bool
) -> None:
    """The disk fills up at every single step of a save."""
    calls = {
        name: getattr(os, name) for name in ("replace", "rename", "link", "symlink", "fsync", "mkdir", "open")
    }
    failures = 0
    fail_at = 0
    while True:
        fail_at += 1
        folder = quick_path / str(fail_at)
        save(folder, 1)
        count = 0

        def step(name: str, *args: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == fail_at:  # noqa: B023 (it is called in this round only)
                raise OSError(number, os.strerror(number))
            if name == "symlink" and not links:
                raise OSError(errno.EPERM, "not on this file system")
            return calls[name](*args, **options)

        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(os, name, lambda *args, name=name, **options: step(name, *args, **options))
            try:
                save(folder, 2)
            except OSError as error:
                failures += 1
                assert error.errno == number and str(folder) in str(error)
                if "Its files are held in" in str(error):
                    assert not links
                    recover(folder)
                    assert read(folder) == whole(2), fail_at
                else:
                    assert "The previous version there is whole" in str(error)
                    assert read(folder) == whole(1), fail_at
            else:
                assert read(folder) == whole(2), fail_at
        save(folder, 4)
        assert read(folder) == whole(4)
        assert_tidy(folder)
        if count < fail_at:
            break
    assert failures > 10


LIMITED = """
import resource
import numpy as np
from safetensors.numpy import save_file

folder, limit = pathlib.Path(sys.argv[2]), int(sys.argv[3])

def save(size):
    def write(new):
        (new / "adapter_config.json").write_text(str(size))
        save_file({"weight": np.zeros(size, dtype=np.uint8)}, new / "adapter_model.safetensors")
    atomic.write_folder(folder, write)

def plain(new):
    (new / "adapter_config.json").write_bytes(bytes(2_000_000))

save(1000)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for attempt in (
    lambda: save(2_000_000),
    lambda: atomic.write_folder(folder, plain),
    lambda: atomic.write_folder(folder / "made", plain),
    lambda: atomic.write_file(folder / "adapter_config.json", bytes(2_000_000)),
):
    try:
        attempt()
    except OSError as error:
        print(errno.errorcode[error.errno], error)
    if sorted(path.name for path in folder.iterdir()) != ["adapter_config.json", "adapter_model.safetensors"]:
        sys.exit(f"left behind: {list(folder.iterdir())}")
    if (folder / "adapter_config.json").read_text() != "1000":
        sys.exit("the old version was touched")
save(2000)
if (folder / "adapter_config.json").read_text() != "2000":
    sys.exit("a save that fits must work again")
"""


def run_limited(before: list[str], folder: Path, limit: int) -> str:
    command = [*before, sys.executable, "-c", LOAD + LIMITED, atomic.__file__, str(folder), str(limit)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def check_refusals(output: str, code: str, reason: str, folder: Path) -> None:
    lines = output.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert line.startswith(code) and str(folder) in line and reason in line and "save again" in line
    for line in (lines[0], lines[1], lines[3]):
        assert "The previous version there is whole." in line
    assert "Nothing was written there." in lines[2]


@needs_signals
def test_a_limit_on_file_sizes_gives_a_clear_error_and_keeps_the_old_version(tmp_path: Path) -> None:
    output = run_limited([], tmp_path / "adapter", 500_000)
    check_refusals(output, "EFBIG", "ulimit -f", tmp_path / "adapter")


def test_a_full_disk_gives_a_clear_error_and_keeps_the_old_version(
    tmp_path: Path, small_disk: list[str]
) -> None:
    output = run_limited(small_disk, tmp_path / "adapter", 0)
    check_refusals(output, "ENOSPC", "the disk is full", tmp_path / "adapter")


@needs_signals
def test_a_hundred_kills_of_one_file_leave_the_old_or_the_new_content(saver: Saver, quick_path: Path) -> None:
    path = quick_path / "state.json"
    write_file(path, "0 " * 5000)
    done = 0
    for kill in range(100):
        done = saver.save_until_killed(path, "file", done + 1, lambda kill=kill: time.sleep(0.0001 * kill))
        words = path.read_text().split()
        assert words in ([str(done)] * 5000, [str(done + 1)] * 5000)
        done = int(words[0])
    write_file(path, b"bytes")
    assert path.read_bytes() == b"bytes"
    assert list(quick_path.iterdir()) == [path]


def test_mistakes_are_named(tmp_path: Path) -> None:
    for name in ("/etc/passwd", "../other", "", ".rankwise-x"):
        with pytest.raises(ValueError, match="`owned` must hold names of files inside the folder"):
            write_folder(tmp_path / "adapter", lambda new: None, [name])
    with pytest.raises(ValueError, match="`write` must make plain files and folders only, but made 'link'"):
        write_folder(tmp_path / "adapter", lambda new: (new / "link").symlink_to("elsewhere"))
    with pytest.raises(ValueError, match=r"names with '.rankwise-' are kept for saving"):
        write_folder(tmp_path / "adapter", lambda new: (new / ".rankwise-x").mkdir())
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="there is a file of this name"):
        write_folder(tmp_path / "file", lambda new: None)
    (tmp_path / "output" / CONFIG).mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="'adapter_config.json' in it is a folder"):
        save(tmp_path / "output", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "output"]
    assert_tidy(tmp_path / "output")


def test_a_file_written_within_the_save_of_a_folder_is_part_of_it(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    make = stage.Stage.make
    monkeypatch.setattr(stage.Stage, "make", lambda folder: made.append(folder) or make(folder))
    save(quick_path, 1)
    made.clear()

    def write(new: Path) -> None:
        write_file(new / CONFIG, json.dumps({"version": 2}))
        write_file(new / "more" / STATE, "")
        assert read(quick_path)[CONFIG] == 1
        raise KeyError("broken off")

    with pytest.raises(KeyError, match="broken off"):
        write_folder(quick_path, write, OWNED)
    assert read(quick_path) == whole(1)
    assert made == [quick_path], "one stage for all of it"
    assert_tidy(quick_path)
