"""Runs PEFT's own tests of LoRA and AdaLoRA on rankwise, and compares the outcomes with the expected ones.

Usage: python tests/peft_suite/run.py [--work FOLDER] [--update] [FILE ...]

FILE is the name of one of PEFT's test files, without "test_" and ".py". By default all of `FILES` are run. The tests
come from the source archive of the installed PEFT version, from the package index. Models that they load from the
Hugging Face hub are replaced by small random ones (`models.py`).

``expected_failures.txt`` lists each test that is expected to fail, with the reason. It is an error if a test fails that
is not listed, fails in another way than listed, or passes although it is listed. ``--update`` rewrites the lists of
tests in that file, under the reasons that it has.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
EXPECTED = HERE / "expected_failures.txt"
FILES = (
    "config seq_classifier feature_extraction_models encoder_decoder_models target_parameters "
    "vision_models tuners_utils "
    "other decoder_models custom_models"
).split()

# Changes to the text of the tests. A test is written for a wrapper around a model; here it gets the model itself.
CHANGES = [
    (r"\.base_model(\.model)?\b", ""),
    # Tests call `forward` with `adapter_names`, which only a wrapper's own `forward` takes.
    (r"model\.forward\(\*\*inputs\)", "model(**inputs)"),
    # The first test of each model asks the hub, and waits long for an answer where there is no network.
    (r"is_offline = .*", "is_offline = True"),
]


class Reason(NamedTuple):
    """A reason for failures, the form of their errors, and the tests that fail for it."""

    text: str
    error: str
    tests: list[str]


def prepare(work: Path) -> None:
    """Fetch PEFT's tests and make the models, unless they exist already."""
    done = work / f"ready-{version('peft')}"
    if done.exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    archive = ["--no-deps", "--no-binary", ":all:", f"peft=={version('peft')}"]
    subprocess.run([*pip, "download", "-qq", "--dest", work, *archive], check=True)
    packages = [
        "diffusers==0.42.1",
        "parameterized==0.9.0",
    ]  # imported by the tests; installed separately, because nothing else needs them
    subprocess.run(
        [*pip, "install", "-qq", "--no-deps", "--upgrade", "--target", work / "packages", *packages],
        check=True,
    )
    (work / "tests").mkdir(exist_ok=True)
    with tarfile.open(work / f"peft-{version('peft')}.tar.gz") as tar:
        for member in tar.getmembers():
            found = re.fullmatch(r"[^/]+/tests/(\w+\.py)", member.name)
            content = tar.extractfile(member) if found else None
            if found and content is not None:
                text = content.read().decode()
                for pattern, new in CHANGES:
                    text = re.sub(pattern, new, text)
                (work / "tests" / found[1]).write_text(text)
    (work / "tests" / "__init__.py").touch()
    (work / "pytest.ini").write_text("[pytest]\naddopts =\n")
    with open(work / "models.log", "w") as log:
        here = {**os.environ, "HF_HOME": str(work / "hub"), "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, HERE / "models.py"], check=True, env=here, stdout=log, stderr=log)
    done.touch()


def run(work: Path, file: str) -> dict[str, str]:
    """Run one file. Return for each test "passed", "skipped" or the error."""
    results = work / f"results-{file}.json"
    results.unlink(missing_ok=True)
    paths = [HERE, HERE.parents[1] / "src", work / "packages"]
    environment = {
        **os.environ,
        "HF_HOME": str(work / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PEFT_SUITE_RESULTS": str(results),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    options = "-q -p in_place -p no:cacheprovider -p no:warnings -p no:xdist --tb=no -rN --no-header".split()
    command = [sys.executable, "-m", "pytest", *options, "-c", "pytest.ini", f"tests/test_{file}.py"]
    with open(work / f"{file}.log", "w") as log:
        subprocess.run(command, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if not results.exists():
        raise SystemExit(f"{file}: the tests did not run; see {work / f'{file}.log'}.")
    return json.loads(results.read_text())


def read_expected() -> list[Reason]:
    """The reasons in ``expected_failures.txt``."""
    reasons: list[Reason] = []
    text: list[str] = []
    for line in EXPECTED.read_text().splitlines():
        if line.startswith("# "):
            text.append(line[2:])
        elif line.startswith("error: "):
            reasons.append(Reason(" ".join(text), line.removeprefix("error: "), []))
            text = []
        elif line.startswith("    "):
            reasons[-1].tests.append(line.strip())
        elif not line:
            text = []
    return reasons


def write_expected(reasons: list[Reason], outcomes: dict[str, str]) -> None:
    """Sort the failed tests in ``outcomes`` under the reasons that match their errors. Other files' tests are kept."""
    files = {test.partition("::")[0] for test in outcomes}
    lines = [HEADER]
    left = {test: error for test, error in outcomes.items() if error not in ("passed", "skipped")}
    for reason in reasons:
        own = [test for test, error in left.items() if re.search(reason.error, error)]
        left = {test: error for test, error in left.items() if test not in own}
        tests = sorted([*own, *(test for test in reason.tests if test.partition("::")[0] not in files)])
        if tests:
            lines += [
                *_wrapped(reason.text),
                f"error: {reason.error}",
                *(f"    {test}" for test in tests),
                "",
            ]
    EXPECTED.write_text("\n".join(lines))


HEADER = """\
# Tests of PEFT's that fail with rankwise in its place, by reason. `python tests/peft_suite/run.py --update` sorts the
# failed tests under the first reason whose expression is found in their error, or in the statement that raised it.
# Write a reason by hand, above its expression.
"""


def _wrapped(text: str, width: int = 118) -> list[str]:
    import textwrap

    return [f"# {line}" for line in textwrap.wrap(text, width)]


def compare(outcomes: dict[str, str], reasons: list[Reason]) -> list[str]:
    """Describe all differences from the expected outcomes."""
    expected = {test: reason for reason in reasons for test in reason.tests}
    wrong = []
    for test, outcome in outcomes.items():
        reason = expected.get(test)
        if outcome == "passed" and reason is not None:
            wrong.append(f"passes, but is listed as failing ({reason.text[:80]}): {test}")
        elif outcome not in ("passed", "skipped") and reason is None:
            wrong.append(f"fails: {test}\n    {outcome[:300]}")
        elif (
            outcome not in ("passed", "skipped")
            and reason is not None
            and not re.search(reason.error, outcome)
        ):
            wrong.append(f"fails otherwise than listed: {test}\n    {outcome[:300]}")
    files = {test.partition("::")[0] for test in outcomes}
    gone = [test for test in expected if test.partition("::")[0] in files and test not in outcomes]
    return wrong + [f"is listed as failing, but does not exist: {test}" for test in gone]


def main() -> int:
    """Run the tests, compare, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(FILES)}; default: all")
    parser.add_argument("--work", type=Path, default=Path(".venv", "peft_suite"), help="folder to work in")
    parser.add_argument(
        "--update", action="store_true", help="rewrite the lists of tests that are expected to fail"
    )
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    prepare(work)
    reasons, outcomes = read_expected(), {}
    for file in arguments.files or FILES:
        began = time.monotonic()
        own = run(work, file)
        passed = sum(outcome == "passed" for outcome in own.values())
        skipped = sum(outcome == "skipped" for outcome in own.values())
        failed = len(own) - passed - skipped
        seconds = time.monotonic() - began
        print(f"{file}: {passed} passed, {failed} failed, {skipped} skipped, {seconds:.0f} s", flush=True)
        outcomes |= own
    if arguments.update:
        write_expected(reasons, outcomes)
        reasons = read_expected()
    wrong = compare(outcomes, reasons)
    for each in wrong:
        print(each)
    passed = sum(outcome == "passed" for outcome in outcomes.values())
    print(
        f"{passed} of {sum(outcome != 'skipped' for outcome in outcomes.values())} tests pass; {len(wrong)} "
        "are not as expected."
    )
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
