"""docs/python.md exists while the pages are built only: every public function with its signature and docstring, and what it returns."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))  # a hook is loaded by its path

import interface

TOP = """# Python

Every command is a function of `toolchain`, made for scripts and notebooks: it returns what the command prints, as an object with `to_text()` and `to_json()`. Read from the code when these
pages were built.

`Model` is a name of the catalogue, the path of a run folder, checkpoint or .fsnn file, a torch module (`toolchain.layers.FeedbackSNN`), or an `Artifact`. `Array` is a NumPy array. Whatever cannot be done raises a
`toolchain.errors.ToolchainError`; its `exit_code` is the command's.

What stands here is the public interface, all of it: the rest of the package may change with any version ([Versions](versions.md)).
"""

LISTED = re.compile(r"^`?(\w+(?:(?:, | and )\w+)*)`? {2,}(\S.*)$")
"""A docstring's line `name   what it is`."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "python.md", content=page()))
    return files


def page() -> str:
    parts = [TOP.strip()]
    told: set[Any] = set()
    for title, modules in interface.PUBLIC.items():
        if title != "Commands":
            parts.append(f"## {title}")
        for module in modules:
            if len(modules) > 1 or title != "Commands":
                needs = interface.OPTIONAL.get(module, ())
                parts.append(f"### {module} {{#{module.replace('.', '-')}}}" + (f"\n\nNeeds {' and '.join(needs)}." if needs else ""))
            parts += _module(module, 2 if title == "Commands" else 4, told)
    return "\n\n".join(parts) + "\n"


def _module(module: str, depth: int, told: set[Any]) -> Iterator[str]:
    plain = []
    for name in interface.names(module):
        found = getattr(import_module(module), name)
        where = "" if depth == 2 else f"{module.removeprefix('toolchain.')}."
        if interface.is_class(found):
            if found in told:
                plain.append(f"`{name}`, of `{found.__module__}`")
            else:
                told.add(found)
                yield _class(found, depth)
        elif interface.is_function(found):
            yield _function(f"{where or 'toolchain.'}{name}", f"{where.replace('.', '-')}{name}", found, depth)
            returned = interface.returned(found) if depth == 2 else None
            if returned is not None and returned not in told:
                told.add(returned)
                yield _class(returned, depth + 1)
        else:
            plain.append(f"`{name}` = {found}" if isinstance(found, (int, float, str)) else f"`{name}`")
    if plain:
        yield f"Also in `{module}`: " + ", ".join(plain) + "."


def _function(shown: str, anchor: str, function: Any, depth: int) -> str:
    return f"{'#' * depth} {anchor.rpartition('-')[2]} {{#{anchor}}}\n\n```python\n{_signature(shown, function)}\n```\n\n{_prose(function.__doc__)}"


def _signature(shown: str, function: Any) -> str:
    written, end = interface.parameters(function)
    line = f"{shown}({', '.join(written)}){end}"
    return line if len(line) <= 80 else f"{shown}(\n" + "".join(f"    {part},\n" for part in written) + f"){end}"


def _class(kind: type, depth: int) -> str:
    parts = [f"{'#' * depth} {kind.__name__}", _prose(kind.__doc__), _fields(kind)]
    members = [f"`{name}`\n:   {_prose(doc, '    ')}" for name, doc in _members(kind)]
    return "\n\n".join(part for part in (*parts, *members) if part)


def _fields(kind: type) -> str:
    lines = interface.fields(kind)
    if interface.made_by(kind):
        lines = [_signature(kind.__name__, interface.made_by(kind)).removesuffix(" -> None")]
    return "```python\n" + "\n".join(lines) + "\n```" if lines else ""


def _members(kind: type) -> Iterator[tuple[str, str]]:
    """Public properties and methods that have something to say."""
    for name, member in interface.members(kind):
        if member.__doc__:
            yield (name if isinstance(member, property) else _signature(name, getattr(kind, name))), member.__doc__


def _prose(doc: str | None, indent: str = "") -> str:
    """A docstring as Markdown: paragraphs, lists of names, and what is indented as code."""
    made: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(doc or "")):
        lines = paragraph.splitlines()
        if lines and all(line.startswith("    ") for line in lines):
            made.append("```python\n" + inspect.cleandoc(paragraph) + "\n```")
        elif lines and (LISTED.match(lines[0]) or lines[0].lstrip() != lines[0]):
            made.append(_listed(lines))
        else:
            made.append(_plain("\n".join(lines)))
    return f"\n\n{indent}".join(part.replace("\n", f"\n{indent}") for part in made)


def _listed(lines: list[str]) -> str:
    entries: list[tuple[str, list[str]]] = []
    for line in lines:
        found = LISTED.match(line)
        if found:
            entries.append((found[1], [found[2]]))
        elif line.startswith(" ") and entries:
            entries[-1][1].append(line.strip())
        else:
            entries.append(("", [line.strip()]))
    return "\n".join(f"- `{name}`: {_plain(' '.join(text))}" if name else f"- {_plain(' '.join(text))}" for name, text in entries)


def _plain(text: str) -> str:
    pieces = text.split("`")
    pieces[::2] = [re.sub(r"([*_|\[\]])", r"\\\1", escape(piece, quote=False)) for piece in pieces[::2]]
    return "`".join(pieces)
