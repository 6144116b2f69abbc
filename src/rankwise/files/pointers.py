"""Recognizes Git LFS pointers: short texts that stand for large files in a clone without Git LFS."""

from __future__ import annotations

from pathlib import Path

_START = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    r"""Explain that a file is a Git LFS pointer, if it is one. Call it when a file can't be read.

    Raises:
        ValueError: the file is a pointer. The message gives the command that fetches the file itself.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "adapter_model.safetensors"
        ...     _ = path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:5e\nsize 9\n")
        ...     try:
        ...         refuse_pointer(path)
        ...     except ValueError as error:
        ...         print(str(error).replace(folder, "adapter"))
        adapter/adapter_model.safetensors is a Git LFS pointer, not the file itself. Fetch it with: git lfs pull
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(_START))
    except OSError:
        return
    if start == _START:
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself. Fetch it with: git lfs pull")
