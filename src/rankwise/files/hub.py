"""Where an adapter is: a folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# What older versions of `huggingface_hub` took, and what it is called now, if it has a meaning at all.
OLD_OPTIONS = {
    "use_auth_token": "token",
    "resume_download": None,
    "proxies": None,
    "local_dir_use_symlinks": None,
}


def find_adapter_folder(
    model_id: str | os.PathLike[str], only_config: bool = False, **hub_options: Any
) -> Path:
    """The local folder of an adapter, downloaded from the hub if ``model_id`` is no folder.

    Args:
        model_id: a folder or "owner/name".
        only_config: of a repository, download the configuration alone.
        hub_options: ``revision``, ``cache_dir``, ``token``, ``subfolder``, … of `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: there is no such folder, and it can't be had from the hub.
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
