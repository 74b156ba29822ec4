"""What `make docs` does beside mkdocs: the README is the first page, and links out of docs/ lead somewhere.

On a code host a page links to `../examples/...`, and the README to `docs/training.md`. On the site docs/ is the root,
and what pages link to elsewhere in the repository stands beside it, under its path. Notebooks become pages with their
outputs. A link to nothing is an error.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(?=[)\s#])")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds the README and every file that a page links to, with the files that those link to."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(notebook)
        text, resources = MarkdownExporter().from_filename(notebook.abs_src_path)
        files.append(File.generated(config, _on_the_site(Path(notebook.abs_src_path)), content=text))
        for name, picture in resources["outputs"].items():
            files.append(File.generated(config, name, content=picture))
    pages = [file for file in files.documentation_pages() if file.abs_src_path]
    for page in pages:  # grows on the way
        for target in LINK.findall(page.content_string):
            place = _on_the_site(_linked(page, target))
            if files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(_linked(page, target))))
                pages += [file for file in files.documentation_pages() if file.src_uri == place]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A page with the links that it has on the site."""
    if page.file.abs_src_path is None:  # a notebook
        return markdown
    here = os.path.dirname(page.file.src_uri)
    return LINK.sub(lambda link: os.path.relpath(_on_the_site(_linked(page.file, link[1])), here or "."), markdown)


def _linked(page: File, target: str) -> Path:
    """The file of the repository that a page links to."""
    path = (Path(page.abs_src_path).parent / target).resolve()
    if path.is_dir():  # leads to what describes it
        path = next(one / "README.md" for one in (path, *path.parents) if (one / "README.md").is_file())
    if not path.is_file():
        raise PluginError(f"{page.src_uri} has a link to {target!r}, and there is no such file.")
    return path


def _on_the_site(path: Path) -> str:
    """Where a file of the repository is on the site."""
    place = path.relative_to(ROOT).as_posix()
    if place == "README.md":
        return "index.md"
    return place.removeprefix("docs/").replace(".ipynb", ".md")
