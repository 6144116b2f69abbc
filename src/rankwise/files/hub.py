"""Finds an adapter in a folder or in a repository on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Options of older versions of `huggingface_hub`, with their present names; None for those without a meaning now.
OLD_OPTIONS = {
    "use_auth_token": "token",
    "resume_download": None,
    "proxies": None,
    "local_dir_use_symlinks": None,
}


def find_adapter_folder(
    model_id: str | os.PathLike[str], only_config: bool = False, **hub_options: Any
) -> Path:
    """Find the local folder of an adapter. If ``model_id`` is not a folder, download it from the hub.

    Args:
        model_id: a folder, or "owner/name" on the hub.
        only_config: whether to download only the configuration from the hub.
        hub_options: options of `huggingface_hub.snapshot_download`, such as ``revision``, ``cache_dir`` and ``token``;
            and ``subfolder``.

    Raises:
        FileNotFoundError: the folder does not exist and can't be downloaded from the hub.
        TypeError: ``model_id`` is neither a string nor a path.
    """
    if not isinstance(model_id, (str, os.PathLike)):
        raise TypeError(
            f"An adapter is given by its folder or its name on the hub, but this is a {type(model_id).__name__}."
        )
    folder = Path(model_id)
    subfolder = hub_options.pop("subfolder", None) or ""
    if not folder.is_dir():
        folder = _download(os.fspath(model_id), subfolder, only_config, hub_options)
    return folder / subfolder


def _download(name: str, subfolder: str, only_config: bool, options: dict[str, Any]) -> Path:
    missing = f"There is no adapter folder {name!r}"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{missing}.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{missing}. To load it from the Hugging Face hub, `pip install huggingface_hub`."
        ) from None
    files = ["adapter_config.json", *([] if only_config else ["adapter_model.*", "rank_history.json"])]
    wanted = [f"{subfolder}/{file}" if subfolder else file for file in files]
    for old, new in OLD_OPTIONS.items():
        if old in options:
            value = options.pop(old)
            if new is not None:
                options.setdefault(new, value)
    try:
        found = snapshot_download(name, allow_patterns=wanted, **options)
    except Exception as error:
        raise FileNotFoundError(f"{missing}, and the Hugging Face hub does not give it: {error}") from error
    return Path(found)
