"""Links that leave docs/ for a file or folder of the repository lead to a page that shows it; `<!-- from FILE: NAME -->` shows a marked part of one.

A page keeps the relative links that work in the repository. While the pages are built, each file they reach is published under source/ (Markdown as a page, a notebook
as its cells, a folder as a list, anything else as code), and the links lead there.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs"
PUBLISHED = "source"
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\n]*)\]\((?P<to>[^)\s]+)\)")
PART = re.compile(r"^<!-- from (?P<file>\S+): (?P<name>\S+) -->$", re.M)
CODE = re.compile(r"^(`{3,}|~{3,})[^\n]*\n.*?^\1[ \t]*$|`[^`\n]+`|^ {4}[^\n]*$", re.M | re.S)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".c": "c", ".h": "c", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    waiting = [file for file in files if file.is_documentation_page()]
    while waiting:
        file = waiting.pop()
        place = _place(file.src_uri)

        def note(target: str, anchor: str, place: str = place, page: str = file.src_uri) -> str:
            uri = _uri(target, place, page)
            if uri is not None and files.get_file_from_path(uri) is None:
                made = File.generated(config, uri, content=_shown(target), inclusion=InclusionLevel.NOT_IN_NAV)
                files.append(made)
                waiting.append(made)
            return target + anchor

        _relinked(_with_parts(file.content_string, place), place, note)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    own = page.file.src_uri
    place = _place(own)

    def lead(target: str, anchor: str) -> str:
        uri = _uri(target, place, own)
        if uri is None:
            uri = target.removeprefix(f"{DOCS}/")
        return posixpath.relpath(uri, posixpath.dirname(own) or ".") + anchor

    return _relinked(_with_parts(markdown, place), place, lead)


def _place(uri: str) -> str:
    """Where a page's text lies in the repository."""
    published = uri.removeprefix(f"{PUBLISHED}/")
    if published == uri:
        return f"{DOCS}/{uri}"
    return published if (ROOT / published).is_file() else published.removesuffix(".md")


def _uri(target: str, place: str, page: str) -> str | None:
    """The page that shows a file of the repository; None for a page of docs/ itself."""
    if target.startswith(f"{DOCS}/"):
        return None
    if not (ROOT / target).exists():
        raise PluginError(f"'{page}' links to '{target}', which is no file or folder of the repository: correct the link in {place}")
    return f"{PUBLISHED}/{target}" if target.endswith(".md") else f"{PUBLISHED}/{target}.md"


def _relinked(text: str, place: str, lead: Callable[[str, str], str]) -> str:
    """`text` with what `lead` makes of the repository path, and the anchor, of every relative link outside code."""

    def changed(link: re.Match[str]) -> str:
        to, mark, anchor = link["to"].partition("#")
        if not to or "://" in to or to.startswith("mailto:"):
            return link[0]
        return f"[{link['text']}]({lead(posixpath.normpath(posixpath.join(posixpath.dirname(place), to)), mark + anchor)})"

    made, end = [], 0
    for code in CODE.finditer(text):
        made += [LINK.sub(changed, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*made, LINK.sub(changed, text[end:])])


def _with_parts(text: str, place: str) -> str:
    """`text` with the parts of other files that it asks for, whose links are made relative to `place`."""

    def part(asked: re.Match[str]) -> str:
        file, name = asked["file"], asked["name"]
        found = re.search(rf"<!-- {name}\b.*?-->\n(.*?)<!-- /{name} -->", (ROOT / file).read_text("utf-8"), re.S)
        if found is None:
            raise PluginError(f"'{place}' shows the part '{name}' of {file}, which has none: mark it <!-- {name} --> ... <!-- /{name} -->")
        return _relinked(found[1], file, lambda target, anchor: posixpath.relpath(target, posixpath.dirname(place)) + anchor)

    return PART.sub(part, text)


def _shown(target: str) -> str:
    """A file of the repository as a page; a folder as the list of its files."""
    if (ROOT / target).is_dir():
        files = sorted(path.name for path in (ROOT / target).iterdir() if path.is_file() and path.suffix in (".md", ".ipynb", *LANGUAGES))
        name = posixpath.basename(target)
        return f"# {name}\n\n`{target}`\n\n" + "".join(f"- [{file}]({name}/{file})\n" for file in files)
    text = (ROOT / target).read_text("utf-8")
    if target.endswith(".md"):
        return text
    if target.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        parts = ["".join(c["source"]) if c["cell_type"] == "markdown" else _fenced("".join(c["source"]), "python") for c in cells]
        return "\n\n".join([f"`{target}`", *parts]) + "\n"
    return f"# {posixpath.basename(target)}\n\n`{target}`\n\n{_fenced(text, LANGUAGES.get(Path(target).suffix, 'text'))}\n"


def _fenced(text: str, language: str) -> str:
    return f"~~~~{language}\n{text.rstrip()}\n~~~~"
