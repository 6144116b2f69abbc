"""``rankwise export``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from rankwise.cli.adapters import Adapter, Overwrite, say_notes
from rankwise.cli.app import app, one_of
from rankwise.cli.failures import failures

if TYPE_CHECKING:
    from rankwise.storage.export.exported import Exported


TARGETS = ("peft-lora", "vllm", "sglang", "gguf", "diffusers", "merged")
PRECISIONS = ("float32", "float16", "bfloat16")


@app.command(epilog="Example: `rankwise export output/reviews --to vllm -o output/reviews-vllm`")
def export(
    adapter: Adapter,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            parser=one_of(*TARGETS),
            metavar="TARGET",
            help=f"The format to write: {', '.join(TARGETS)}.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="The folder to write. For gguf, the file to write.",
            show_default=False,
        ),
    ],
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="The base model's folder or .gguf file, if it isn't the one that the adapter names.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            parser=one_of(*PRECISIONS),
            metavar="DTYPE",
            help=f"The dtype of the written factors: {', '.join(PRECISIONS)}. Default: the adapter's own.",
            show_default=False,
        ),
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(
            "--component",
            metavar="NAME",
            help="For diffusers: the adapted model's name in the pipeline, such as unet or transformer.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter in the format that a server reads.

    **peft-lora**: plain LoRA with a rank for each layer. **vllm**: the same, checked against vLLM's limits. **sglang**
    (for LoRAX, too): one rank for all layers; lower ranks are padded with zeros. **gguf**: a file for llama.cpp and
    Ollama. **diffusers**: a file for `pipe.load_lora_weights`. **merged**: a whole model folder, with its head, that
    Transformers loads by itself. If a server can't load an adapter, the error says what to do instead.
    """
    with failures(ValueError, TypeError, OSError):
        import torch

        from rankwise.storage.export import export_adapter

        if to == "merged" and dtype is None and component is None:
            exported = _merged(adapter, output, base, overwrite)
        else:
            exported = export_adapter(
                output,
                adapter,
                to,  # type: ignore[arg-type]  # one of the targets, as the parser says
                base=base,
                dtype=None if dtype is None else getattr(torch, dtype),
                component=component,
                overwrite=overwrite,
            )
    say_notes(Console(), (f"Saved to {exported.path}", *exported.notes))


def _merged(adapter: Path, output: Path, base: Path | None, overwrite: bool) -> Exported:
    """Merge within the base model's files. Load the model where it has a new head or its task has settings."""
    from rankwise.storage.export import export_adapter
    from rankwise.storage.export.exported import NotInBase

    try:
        from rankwise.recipes.predicting.merging import merge_adapter, needs_loading
    except ImportError:  # without the extra `train`, only the merge within files is possible
        return export_adapter(output, adapter, "merged", base=base, overwrite=overwrite)
    if not needs_loading(adapter, base):
        with contextlib.suppress(NotInBase):
            return export_adapter(output, adapter, "merged", base=base, overwrite=overwrite)
    return merge_adapter(adapter, output, base=base, overwrite=overwrite)
