"""What MkDocs can't do by itself: pages from outside docs/, and links that work on GitHub and on the site.

MkDocs knows the files in docs/ only. `PAGES` adds others. A link to a file that is no page leads to the repository,
if `repo_url` is set, and to a copy of the file otherwise. A link to a file that does not exist ends a strict build.
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/quality/results.md": "quality-results.md",
    "benchmarks/quality/choices.md": "quality-choices.md",
    "notebooks/quickstart.ipynb": "notebook.md",
}
SOURCES = {page: source for source, page in PAGES.items()}

log = logging.getLogger("mkdocs.hooks.site")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source.endswith(".ipynb"):
            text = notebook_as_markdown(json.loads(text))
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Make each link of a page relative to the site, where the page gives it relative to the repository."""
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["toc"]  # room for the lines of code
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def mended(link: re.Match[str]) -> str:
        target, hash_sign, anchor = link["target"].partition("#")
        if not target or ":" in target:
            return link[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        address = place_on_site(wanted, source, page, config, files)
        return f"{link['before']}{address}{hash_sign}{anchor}{link['after']}"

    lines, fenced = [], False
    for line in markdown.splitlines():
        fenced ^= line.lstrip().startswith("```")
        lines.append(line if fenced else LINK.sub(mended, line))
    return "\n".join(lines)


LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s]+)(?P<after>\))")


def place_on_site(wanted: str, source: str, page: Any, config: Any, files: Files) -> str:
    """The address, seen from ``page``, of the file at the path ``wanted`` of the repository."""
    if not (ROOT / wanted).exists():
        log.warning(f"{source} links to {wanted}, which does not exist.")
        return wanted
    here = posixpath.dirname(page.file.src_uri) or "."
    if wanted in PAGES:
        return posixpath.relpath(PAGES[wanted], here)
    if wanted.startswith("docs/"):
        return posixpath.relpath(wanted.removeprefix("docs/"), here)
    if config.repo_url:
        return f"{config.repo_url.rstrip('/')}/blob/main/{wanted}"
    copy = f"source/{wanted}.txt"
    if files.get_file_from_path(copy) is None:
        files.append(File.generated(config, copy, abs_src_path=str(ROOT / wanted)))
    return posixpath.relpath(copy, here)


def notebook_as_markdown(notebook: dict[str, Any]) -> str:
    """The cells of a notebook without outputs, as the text and the code of a page."""
    cells = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        cells.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(cells)
