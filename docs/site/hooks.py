"""What the site shows that does not lie in docs/: the notebook, CHANGELOG, CONTRIBUTING, plots, MathJax."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
MATHJAX = ROOT / "build" / "mathjax" / "package" / "es5" / "tex-svg.js"
NOTEBOOK = ROOT / "examples" / "backprop_by_hand.ipynb"
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds them, under names of their own."""
    for outside, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / outside).read_text(encoding="utf-8")))
    for plot in ROOT.glob("benchmarks/results/*/plots/*.png"):
        files.append(File.generated(config, plot.relative_to(ROOT).as_posix(), abs_src_path=str(plot)))
    files.append(File.generated(config, "javascripts/tex-svg.js", abs_src_path=str(MATHJAX)))
    for name, content in notebook_files().items():
        files.append(File.generated(config, name, content=content))
    return files


def notebook_files() -> dict[str, str | bytes]:
    """The notebook as a page, and its pictures."""
    import nbformat
    from nbconvert import MarkdownExporter

    body, resources = MarkdownExporter().from_notebook_node(nbformat.read(NOTEBOOK, as_version=4))
    pictures = {f"notebook/{name}": data for name, data in resources["outputs"].items()}
    for name in resources["outputs"]:
        body = body.replace(f"]({name})", f"](notebook/{name})")
    return {"backprop_by_hand.md": body, **pictures}


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links that lead out of docs/ go to the page that the site has for it, or are text where it has none."""
    here = next((o for o, p in PAGES.items() if p == page.file.src_uri), f"docs/{page.file.src_uri}")

    def link(found: re.Match[str]) -> str:
        picture, text, target, anchor = found.groups()
        if not target or re.match(r"\w+:", target):
            return found.group(0)
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        on_site = PAGES.get(path) or (path[len("docs/") :] if path.startswith("docs/") else path)
        if files.get_file_from_path(on_site) is None:
            return f"`{text.strip('`')}`" if not path.startswith("docs/") else found.group(0)
        relative = posixpath.relpath(on_site, posixpath.dirname(page.file.src_uri) or ".")
        return f"{picture}[{text}]({relative}{anchor or ''})"

    return LINK.sub(link, markdown)
