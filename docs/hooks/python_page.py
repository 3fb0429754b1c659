"""docs/python.md exists while the pages are built only: every public function with its signature and docstring, and what it returns."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from html import escape
from importlib import import_module
from typing import Any

import msgspec
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import toolchain

TOP = """# Python

Every command is a function of `toolchain`, made for scripts and notebooks: it returns what the command prints, as an object with `to_text()` and `to_json()`. Read from the code when these
pages were built.

`Model` is a name of the catalogue, the path of a run folder, checkpoint or .fsnn file, a torch module (`toolchain.layers.FeedbackSNN`), or an `Artifact`. `Array` is a NumPy array. Whatever cannot be done raises a
`toolchain.errors.ToolchainError`; its `exit_code` is the command's.
"""

MORE = {
    "Data sets": ("toolchain.data", ("load", "hold_out", "Dataset")),
    "A network as data": (
        "toolchain.network",
        ("Network", "Neuron", "Linear", "Conv2d", "ConvTranspose2d", "AvgPool2d", "Feedback", "Spectral", "Frobenius", "Normalization"),
    ),
    "Targets": ("toolchain.target", ("get", "names", "Target", "Executable", "Result", "History")),
}
"""Beside the functions of `toolchain`: what a script needs, section by section."""

LISTED = re.compile(r"^`?(\w+(?:(?:, | and )\w+)*)`? {2,}(\S.*)$")
"""A docstring's line `name   what it is`."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "python.md", content=page()))
    return files


def page() -> str:
    parts = [TOP.strip()]
    told: set[type] = set()
    for name in toolchain.__all__:
        found = getattr(toolchain, name)
        if callable(found):
            parts.append(_function(f"toolchain.{name}", name, found, 2))
            returned = _returned(found)
            if returned is not None and returned not in told:
                told.add(returned)
                parts.append(_class(returned, 3))
    for title, (module, names) in MORE.items():
        parts.append(f"## {title}\n\nIn `{module}`.")
        for name in names:
            found = getattr(import_module(module), name)
            parts.append(
                _class(found, 3)
                if inspect.isclass(found)
                else _function(f"{module.removeprefix('toolchain.')}.{name}", f"{title.split()[0].lower()}-{name}", found, 3)
            )
    return "\n\n".join(parts) + "\n"


def _function(shown: str, anchor: str, function: Any, depth: int) -> str:
    return f"{'#' * depth} {anchor.rpartition('-')[2]} {{#{anchor}}}\n\n```python\n{_signature(shown, function)}\n```\n\n{_prose(function.__doc__)}"


def _signature(shown: str, function: Any) -> str:
    signature = inspect.signature(function)
    written, starred = [], False
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            written.append("*")
            starred = True
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        written.append(f"{stars}{parameter.name}{_typed(parameter.annotation, ': ')}{default}")
    end = _typed(signature.return_annotation, " -> ")
    line = f"{shown}({', '.join(written)}){end}"
    return line if len(line) <= 80 else f"{shown}(\n" + "".join(f"    {part},\n" for part in written) + f"){end}"


def _typed(annotation: Any, before: str) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return before + (annotation if isinstance(annotation, str) else inspect.formatannotation(annotation))


def _returned(function: Any) -> type | None:
    """The class of ours that a function returns; it may be imported for type checkers only, so it is looked for in the modules that are loaded."""
    name = str(inspect.signature(function).return_annotation).strip("'")
    own = getattr(sys.modules[function.__module__], name, None)
    elsewhere = (vars(module).get(name) for key, module in sorted(sys.modules.items()) if key.startswith("toolchain."))
    found = next((kind for kind in (own, *elsewhere) if inspect.isclass(kind)), None)
    return found if found is not None and found.__module__.startswith("toolchain.") else None


def _class(kind: type, depth: int) -> str:
    parts = [f"{'#' * depth} {kind.__name__}", _prose(kind.__doc__), _fields(kind)]
    members = [f"`{name}`\n:   {_prose(doc, '    ')}" for name, doc in _members(kind)]
    return "\n\n".join(part for part in (*parts, *members) if part)


def _fields(kind: type) -> str:
    """Names, types and defaults, as they would be written."""
    lines = []
    if dataclasses.is_dataclass(kind):
        for field in dataclasses.fields(kind):
            default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
            lines.append(f"{field.name}{_typed(field.type, ': ')}{default}")
    elif issubclass(kind, msgspec.Struct):
        lines = [f"{f.name}{'' if f.default is msgspec.NODEFAULT else f' = {f.default!r}'}" for f in msgspec.structs.fields(kind)]
    return "```python\n" + "\n".join(lines) + "\n```" if lines else ""


def _members(kind: type) -> Iterator[tuple[str, str]]:
    """Public properties and methods that have something to say."""
    for name, member in vars(kind).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property) and member.__doc__:
            yield name, member.__doc__
        elif inspect.isfunction(member) and member.__doc__:
            yield _signature(name, member), member.__doc__


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
