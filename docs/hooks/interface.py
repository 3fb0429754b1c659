"""The public interface, read from the code: the modules that have one, and a line for every name in their `__all__`.

    python docs/hooks/interface.py > docs/interface.txt

keeps docs/interface.txt, whose changes between two versions are what a user has to know; a test compares it with the code.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any, get_origin

import msgspec
import typer

from toolchain import cli

PUBLIC = {
    "Commands": ("toolchain",),
    "Errors": ("toolchain.errors",),
    "Data sets": ("toolchain.data", "toolchain.augment"),
    "A network as data": ("toolchain.network",),
    "A network as a torch module": ("toolchain.layers", "toolchain.models"),
    "Training methods": (
        "toolchain.methods",
        "toolchain.methods.ide",
        "toolchain.methods.spide",
        "toolchain.methods.dsr",
        "toolchain.methods.ottt",
        "toolchain.methods.saf",
        "toolchain.processes",
    ),
    "Graphs and artefacts": ("toolchain.ir", "toolchain.passes", "toolchain.artifact", "toolchain.limits"),
    "Targets": ("toolchain.target", "toolchain.source", "toolchain.compiler"),
    "What a graph does and costs": ("toolchain.analysis", "toolchain.analysis.side_by_side", "toolchain.utilisation", "toolchain.tradeoff"),
    "NIR in torch": ("toolchain.exchange.nir_torch",),
}
"""Modules by the section of the Python page that shows them. Every other module is internal."""

OPTIONAL = {"toolchain.exchange.nir_torch": ("nir", "nirtorch")}
"""What a public module needs beyond the core."""

VERSION = "__version__"


def modules() -> list[str]:
    return [module for part in PUBLIC.values() for module in part]


def names(module: str) -> list[str]:
    return [name for name in import_module(module).__all__ if name != VERSION]


def is_class(found: object) -> bool:
    """Python 3.10 takes list[int] for a class."""
    return inspect.isclass(found) and get_origin(found) is None


def is_function(found: object) -> bool:
    """One that keeps its answers (functools.cache) too."""
    return callable(found) and inspect.isfunction(inspect.unwrap(found))


def returned(function: Any) -> type | None:
    """The class of ours that a function returns; it may be imported for type checkers only, so it is looked for in the modules that are loaded."""
    name = str(inspect.signature(function).return_annotation).strip("'")
    own = getattr(sys.modules[function.__module__], name, None)
    elsewhere = (vars(module).get(name) for key, module in sorted(sys.modules.items()) if key.startswith("toolchain."))
    found = next((kind for kind in (own, *elsewhere) if inspect.isclass(kind)), None)
    return found if found is not None and found.__module__.startswith("toolchain.") else None


def typed(annotation: Any, before: str) -> str:
    """An annotation as it is written in the source, after `before`; nothing where there is none."""
    if annotation is inspect.Parameter.empty:
        return ""
    return before + (annotation if isinstance(annotation, str) else inspect.formatannotation(annotation))


def parameters(function: Any) -> tuple[list[str], str]:
    """The parameters of a function as they would be written, without `self`, and its return type after an arrow."""
    signature = inspect.signature(function)
    written, starred = [], False
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            written.append("*")
            starred = True
        default = "" if parameter.default is parameter.empty else f" = {shown(parameter.default)}"
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        written.append(f"{stars}{parameter.name}{typed(parameter.annotation, ': ')}{default}")
    return written, typed(signature.return_annotation, " -> ")


def shown(value: object) -> str:
    """A default value; those that say where in memory they are by their name."""
    return getattr(value, "__name__", repr(value)) if callable(value) else repr(value)


def fields(kind: type) -> list[str]:
    """Names, types and defaults of a dataclass or struct, as they would be written."""
    if dataclasses.is_dataclass(kind):
        return [
            f"{field.name}{typed(field.type, ': ')}{'' if field.default is dataclasses.MISSING else f' = {shown(field.default)}'}"
            for field in dataclasses.fields(kind)
            if not field.name.startswith("_")
        ]
    if issubclass(kind, msgspec.Struct):
        return [f"{f.name}{'' if f.default is msgspec.NODEFAULT else f' = {f.default!r}'}" for f in msgspec.structs.fields(kind)]
    return []


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """The public properties and methods that a class defines itself."""
    for name, member in vars(kind).items():
        if not name.startswith("_") and (isinstance(member, (property, classmethod, staticmethod)) or inspect.isfunction(member)):
            yield name, member


def made_by(kind: type) -> Any:
    """The constructor that a class writes itself; None where its fields say all, or another class's serves."""
    own = vars(kind).get("__init__")
    return own if inspect.isfunction(own) and own.__module__ == kind.__module__ and not dataclasses.is_dataclass(kind) else None


def lines() -> Iterator[str]:
    """The whole interface, a line each: verbs with their options; functions with their parameters, classes with fields, methods and properties, constants."""
    group = typer.main.get_command(cli.app)
    for verb, command in sorted(getattr(group, "commands").items()):  # noqa: B009 (typer's type does not tell)
        yield f"toolchain {verb}"
        for option in sorted((p for p in command.params if p.name != "help"), key=lambda p: (p.param_type_name == "option", p.opts)):
            yield f"    {' '.join((*option.opts, *option.secondary_opts))}"
    told: set[type] = set()
    for module in modules():
        for name in names(module):
            found = getattr(import_module(module), name)
            yield from _described(f"{module}.{name}", found)
            kind = returned(found) if module == "toolchain" else None
            if kind is not None and kind not in told:
                told.add(kind)
                yield from _described(f"{name}() -> {kind.__name__}", kind)


def _described(path: str, found: Any) -> Iterator[str]:
    if is_class(found):
        yield f"class {path}{_going(found)}"
        if issubclass(found, enum.Enum):
            yield from (f"    {item.name} = {item.value!r}" for item in found)
        yield from (f"    {field}" for field in fields(found))
        if made_by(found):
            yield f"    def __init__({', '.join(parameters(made_by(found))[0])})"
        for name, member in members(found):
            if isinstance(member, property):
                yield f"    property {name}"
            else:
                written, end = parameters(getattr(found, name))
                yield f"    def {name}({', '.join(written)}){end}"
    elif is_function(found):
        written, end = parameters(found)
        yield f"def {path}({', '.join(written)}){end}{_going(found)}"
    else:
        yield f"{path} = {found!r}" if isinstance(found, (int, float, str)) else path


def _going(found: Any) -> str:
    """What a deprecated function or class says of itself (PEP 702)."""
    text = getattr(found, "__deprecated__", None)
    return f" ({text})" if text else ""


if __name__ == "__main__":
    print(*lines(), sep="\n")
