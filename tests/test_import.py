"""`import rankwise` stays fast and needs only PyTorch and safetensors, and chapters import only inner chapters."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import rankwise

SOURCE = Path(rankwise.__file__).parent

ALLOWED_RATIO = 1.3
EXTRAS = (
    "accelerate",
    "datasets",
    "matplotlib",
    "omegaconf",
    "peft",
    "pydantic",
    "rich",
    "transformers",
    "typer",
)


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=300
    )
    return result.stdout.strip()


def test_importing_rankwise_takes_hardly_longer_than_importing_torch_and_loads_no_optional_library():
    """Processor time is measured, which other processes disturb least. A second try may find the machine less busy."""
    ratios = []
    for _ in range(2):
        seconds, *loaded = run_python("""
            import sys, time
            start = time.process_time()
            import torch
            between, before = time.process_time(), set(sys.modules)
            import rankwise
            end = time.process_time()
            print((end - start) / (between - start), *set(sys.modules) - before)
        """).split()
        ratios.append(float(seconds))
        assert "rankwise" in loaded
        assert not {name.partition(".")[0] for name in loaded} & set(EXTRAS)
        if ratios[-1] <= ALLOWED_RATIO:
            return
    raise AssertionError(f"import rankwise takes {min(ratios):.2f} times what import torch takes")


def test_the_core_works_without_any_optional_library():
    """Attach, train one step and save, with all extras hidden from the import system."""
    run_python(f"""
        import sys, tempfile
        class Hidden:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {EXTRAS!r}:
                    raise ModuleNotFoundError("No module named " + repr(name), name=name)
        sys.meta_path.insert(0, Hidden())

        import torch
        import rankwise as rw

        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        config = rw.AdaLoraConfig(
            init_r=4, target_r=2, tinit=1, tfinal=1, total_step=4, target_modules=["0", "1"]
        )
        model = rw.get_peft_model(model, config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(4):
            model(torch.randn(16, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model.rank_summary().total_rank == 4, model.rank_summary()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
    """)


CHAPTERS = (
    "method files config parallel adapters attach run adapt storage integrations model peft_api report recipes cli"
).split()


def imports_of_chapters() -> Iterator[tuple[Path, str, str]]:
    """Each import that runs when a file is imported: the file, its chapter, and the imported chapter."""
    for file in sorted(SOURCE.glob("*/**/*.py")):
        chapter = file.relative_to(SOURCE).parts[0]
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                library, _, rest = name.partition(".")
                other = rest.partition(".")[0]
                if library == "rankwise" and (SOURCE / other).is_dir() and other != chapter:
                    yield file, chapter, other


def test_chapters_import_only_those_further_inside() -> None:
    """Imports therefore have no cycles, and the method can be read and tested without a model."""
    assert {folder.name for folder in SOURCE.iterdir() if (folder / "__init__.py").is_file()} == set(CHAPTERS)
    found = list(imports_of_chapters())
    assert len(found) > 100
    outward = [
        f"{file} imports {other}"
        for file, chapter, other in found
        if CHAPTERS.index(other) > CHAPTERS.index(chapter)
    ]
    assert not outward


def imports_within_chapters() -> dict[str, set[str]]:
    """For each module, the modules of its own chapter that it imports, also in functions or for type checkers."""
    files = {
        ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): file
        for file in SOURCE.glob("*/**/*.py")
    }
    found: dict[str, set[str]] = {module: set() for module in files}
    for module, file in files.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in files else str(node.module) for name in inside]
            chapter = module.split(".")[1]
            found[module] |= {
                name
                for name in names
                if name in files and name.split(".")[1] == chapter and "." in name[len("rankwise.") :]
            }
    return found


def test_no_two_modules_of_a_chapter_import_each_other_not_even_for_their_types() -> None:
    """A reader who follows imports therefore comes to an end."""
    imports = imports_within_chapters()
    assert sum(map(len, imports.values())) > 100
    while done := [module for module, others in imports.items() if not others & imports.keys()]:
        for module in done:
            del imports[module]
    assert not {module: sorted(others & imports.keys()) for module, others in imports.items()}
