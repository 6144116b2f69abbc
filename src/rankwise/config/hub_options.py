"""The options that functions pass on to the Hugging Face hub, and their check."""

from __future__ import annotations

from collections.abc import Iterable

from rankwise.config.suggest import suggestion
from rankwise.files.hub import OLD_OPTIONS

# The options of `huggingface_hub.snapshot_download`, and `subfolder`, a folder in the repository.
HUB_OPTIONS = frozenset(
    "cache_dir endpoint etag_timeout force_download headers library_name library_version local_dir local_files_only "
    "max_workers repo_type revision subfolder tqdm_class token user_agent".split()
)


def check_hub_options(function: str, options: Iterable[str], more: Iterable[str] = ()) -> None:
    """Check that every option is a known one.

    Args:
        function: name of the function that the user called, for the message.
        options: names of the options that the user gave.
        more: names of options that the function takes in addition to those for the hub.

    Raises:
        TypeError: an option is unknown. The message suggests the nearest known one.

    Example:
        >>> check_hub_options("load", ["revison"])
        Traceback (most recent call last):
        ...
        TypeError: load has no argument 'revison'. Did you mean 'revision'?
    """
    known = {*HUB_OPTIONS, *OLD_OPTIONS, *more}
    for name in options:
        if name not in known:
            raise TypeError(
                f"{function} has no argument {name!r}.{suggestion(name, sorted(known - set(OLD_OPTIONS)))}"
            )
