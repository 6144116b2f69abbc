"""``rankwise export``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rankwise.cli.adapters import Adapter, Overwrite
from rankwise.cli.app import app
from rankwise.cli.failures import failures


class Target(str, Enum):
    """What to export to."""

    PEFT_LORA = "peft-lora"
    VLLM = "vllm"
    SGLANG = "sglang"
    GGUF = "gguf"
    DIFFUSERS = "diffusers"
    MERGED = "merged"


class Precision(str, Enum):
    """The dtype of written factors."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@app.command(epilog="Example: `rankwise export output/reviews --to vllm -o output/reviews-vllm`")
def export(
    adapter: Adapter,
    to: Annotated[Target, typer.Option("--to", help="Which server is to read it.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="The folder to write; for gguf the file.",
            show_default=False,
        ),
    ],
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="The base model's folder, or its .gguf file, if it isn't where the adapter says.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option("--dtype", help="Of the written factors; as they are if left out.", show_default=False),
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(
            "--component",
            metavar="NAME",
            help="For diffusers: what the pipeline calls the adapted model, such as unet or transformer.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter in the form that a server reads.

    **peft-lora**: plain LoRA with a rank for each layer. **vllm**: the same, checked for what vLLM takes. **sglang**,
    for LoRAX too: one rank, with zeros where a layer has fewer or none. **gguf**: a file for llama.cpp and Ollama.
    **diffusers**: a file for `pipe.load_lora_weights`. **merged**: a whole model folder, in the base's dtype. What a
    server can't take is refused, with the way round it.
    """
    with failures(ValueError, TypeError, OSError):
        import torch

        from rankwise.storage.export import export_adapter

        exported = export_adapter(
            output,
            adapter,
            to.value,
            base=base,
            dtype=None if dtype is None else getattr(torch, dtype.value),
            component=component,
            overwrite=overwrite,
        )
    console = Console()
    for line in (f"Saved to {exported.path}", *exported.notes):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
