"""docs/commands.md and docs/networks.md exist while the pages are built only: the reference of every verb, read from the command line itself, and the catalogue."""

from __future__ import annotations

import inspect
from html import escape
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import toolchain
from toolchain import cli, endings, errors, models

TOP = """# Commands

Read from the code when these pages were built, version {version}. stdout is the result (`--json`: one JSON object), stderr is for people; `MODEL` is a name of the catalogue
([networks](networks.md)), a run folder, a checkpoint or a .fsnn file. `--debug`, before or after the verb, shows the traceback of an error. Every verb that has a function of its name
is linked to it.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "commands.md", content=commands()))
    files.append(File.generated(config, "networks.md", content=networks()))
    return files


def commands() -> str:
    group: Any = typer.main.get_command(cli.app)
    verbs = [verb for verb in group.commands.values() if not verb.hidden]
    return "\n\n".join([TOP.format(version=toolchain.__version__).strip(), *map(_verb, verbs), _exit_codes()]) + "\n"


def _verb(verb: Any) -> str:
    arguments = [p for p in verb.params if p.param_type_name == "argument"]
    options = [p for p in verb.params if p.param_type_name == "option"]
    usage = " ".join(
        [
            "toolchain",
            verb.name,
            *(p.metavar or p.name for p in arguments),
            *(f"{min(p.opts, key=len)} {p.metavar}" for p in options if p.required),
        ]
    )
    optional = " [OPTIONS]" if any(not p.required for p in options) else ""
    examples = [line.strip() for line in (verb.epilog or "").splitlines() if line.startswith("  toolchain ")]
    named = next((name for name in (verb.name, f"{verb.name}_") if name in toolchain.__all__), None)
    parts = [
        f"## {verb.name}",
        f"```text\n{usage}{optional}\n```",
        _plain(inspect.cleandoc(verb.help)),
        *(f"`{p.metavar or p.name}`\n:   {_plain(p.help)}" for p in arguments),
        *(f"`{_written(p)}`\n:   {_meaning(p)}" for p in options),
        "```bash\n" + "\n".join(examples) + "\n```" if examples else "",
        f"In Python: [`toolchain.{named}`](python.md#{named})" if named else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _written(option: Any) -> str:
    """`-o, --output RUN`, as `--help` has it."""
    names = ", ".join(sorted(option.opts, key=len))
    return names if option.is_flag else f"{names} {option.metavar or option.name.upper()}"


def _meaning(option: Any) -> str:
    told = _plain(option.help)
    if option.required:
        return f"{told} Required."
    default = None if option.is_flag or option.multiple or option.default in (None, "") else option.default
    return told if default is None else f"{told} Default: `{default}`."


def _plain(text: str) -> str:
    """Text of `--help` as Markdown: only the code spans mean anything."""
    pieces = text.split("`")
    pieces[::2] = [escape(piece, quote=False).replace("*", r"\*").replace("_", r"\_") for piece in pieces[::2]]
    return "`".join(pieces)


def _exit_codes() -> str:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.ToolchainError)]
    kinds.sort(key=lambda kind: (kind.exit_code, len(kind.__mro__)))
    rows = [f"| {kind.exit_code} | `{kind.__name__}` | {_plain(' '.join((kind.__doc__ or '').split()))} |" for kind in kinds]
    rows += [f"| {code} | | {word} |" for code, word in sorted(endings.WORDS.items())]
    table = ["| code | in Python | |", "|---|---|---|", "| 0 | | done |", *rows]
    return "## Exit codes\n\n" + "\n".join(table) + "\n\nWhat the sentences look like: [When something is wrong](errors.md)."


def networks() -> str:
    """The catalogue; a network that comes trained has a card, every one has its file."""
    rows = []
    for name in models.names():
        spec = models.get(name)
        card = f"[card](../models/{spec.module}.md)" if spec.shipped else ""
        rows.append(f"| [{name}](../models/{spec.module}.py) | {_plain(spec.description)} | {card} |")
    head = "# Networks\n\nThose that `toolchain models` lists: one file each, with the paper's settings. A card says how good the weights that come with the package are, and how they were made."
    return "\n".join([head, "", "| name | what it is | trained |", "|---|---|---|", *rows, ""])
