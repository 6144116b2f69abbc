"""Options for the Hugging Face hub, and what was meant by one that there is not."""

from __future__ import annotations

from collections.abc import Iterable

from rankwise.config.suggest import suggestion
from rankwise.files.hub import OLD_OPTIONS

# Of `huggingface_hub.snapshot_download`, and a folder in the repository.
HUB_OPTIONS = frozenset(
    "cache_dir endpoint etag_timeout force_download headers library_name library_version local_dir local_files_only "
    "max_workers repo_type revision subfolder tqdm_class token user_agent".split()
)


def check_hub_options(function: str, options: Iterable[str], more: Iterable[str] = ()) -> None:
    """See that all options have a meaning.

    Args:
        function: what the user has called.
        options: names that he gave.
        more: names that it takes beside those for the hub.

    Raises:
        TypeError: it takes no such option; the message names the nearest that it takes.

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
