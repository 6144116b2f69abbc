"""Where an adapter is: a folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def find_adapter_folder(model_id: str | os.PathLike[str], **hub_options: Any) -> Path:
    """The local folder of an adapter, downloaded from the hub if ``model_id`` is no folder.

    Args:
        model_id: a folder or "owner/name".
        hub_options: ``revision``, ``cache_dir``, ``token``, ``subfolder``, … of `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: there is no such folder, and it can't be had from the hub.
    """
    folder = Path(model_id)
    subfolder = hub_options.pop("subfolder", None) or ""
    if not folder.is_dir():
        folder = _download(str(model_id), subfolder, hub_options)
    return folder / subfolder


def _download(name: str, subfolder: str, options: dict[str, Any]) -> Path:
    missing = f"There is no adapter folder {name!r}"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{missing}.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{missing}. To load it from the Hugging Face hub, `pip install huggingface_hub`."
        ) from None
    files = ["adapter_config.json", "adapter_model.*", "rank_history.json"]
    try:
        found = snapshot_download(
            name, allow_patterns=[f"{subfolder}/{file}" if subfolder else file for file in files], **options
        )
    except Exception as error:
        raise FileNotFoundError(f"{missing}, and the Hugging Face hub does not give it: {error}") from error
    return Path(found)
