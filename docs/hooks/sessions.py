"""Runs what pages show: every block marked `run` is executed while the pages are built, in a folder of the page's own, and what it printed stands below it.

    ```bash run                    commands of `toolchain`, a line each; a status other than 0 stops the build
    ```bash run exit=4             the last one ends with 4
    ```bash run needs=lava-sim     left out, and said so, where this target cannot run
    ```bash run tail=3             only the last 3 lines are shown
    ```python run                  Python
    <!-- picture out/a.png: text for those who do not see it -->     a picture that a block wrote
    <!-- file out/index.html: words -->                              a link to a file, or a page, that a block wrote

A page's blocks share a folder and run in order. What they gave is kept in out/docs until they, the code or an installed package change.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from toolchain import target
from toolchain.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "out" / "docs"
CODE = ("toolchain", "targets", "models")
BLOCK = re.compile(r"^```(?P<language>bash|python) run(?P<options>[^\n]*)\n(?P<body>.*?)^```$", re.M | re.S)
SHOWN = re.compile(r"^<!-- (?P<kind>picture|file) (?P<path>\S+): (?P<text>.+?) -->$", re.M)
SECONDS = 240
COLUMNS = re.compile(r"\S {2,}\S.*\S {2,}\S")
"""A row of a table, which must not be wrapped; sentences are."""

log = get_plugin_logger("sessions")
sessions: dict[str, Path] = {}
"""The folder of each page with blocks, for this build: the code may change while it runs."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    sessions.clear()
    state = _state()
    for file in list(files):
        if not file.is_documentation_page() or not BLOCK.search(file.content_string):
            continue
        folder = _session(file.src_uri, [_read(block) for block in BLOCK.finditer(file.content_string)], state)
        sessions[file.src_uri] = folder
        for asked in SHOWN.finditer(file.content_string):
            made = folder / "work" / asked["path"]
            if made.is_file():
                files.append(File.generated(config, _beside(file.src_uri, asked["path"]), abs_src_path=str(made)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri not in sessions:
        return markdown
    printed = iter(json.loads((sessions[page.file.src_uri] / "printed.json").read_text("utf-8")))

    def with_output(block: re.Match[str]) -> str:
        below = next(printed)
        above = f"```{block['language']}\n{block['body']}```"
        if "missing" in below:
            return f"{above}\n\n*Not run when these pages were built. {below['missing']}.*"
        return f"{above}\n\n```{{.text .printed{'' if COLUMNS.search(below['text']) else ' .wrapped'}}}\n{below['text']}\n```"

    def shown(asked: re.Match[str]) -> str:
        uri = _beside(page.file.src_uri, asked["path"])
        if files.get_file_from_path(uri) is None:
            return ""
        place = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"{'!' if asked['kind'] == 'picture' else ''}[{asked['text']}]({place})"

    return SHOWN.sub(shown, BLOCK.sub(with_output, markdown))


def _beside(page: str, path: str) -> str:
    """Where what a page's blocks wrote is published."""
    return f"{page.removesuffix('.md')}-files/{path}"


def _read(block: re.Match[str]) -> dict[str, str]:
    options = dict(option.split("=", 1) for option in block["options"].split())
    return {"language": block["language"], "body": block["body"], **options}


def _session(page: str, blocks: list[dict[str, str]], state: str) -> Path:
    """The folder with what a page's blocks printed and wrote: kept from before, or made now."""
    key = hashlib.sha256(json.dumps([blocks, state]).encode()).hexdigest()[:20]
    name = page.removesuffix(".md").replace("/", "-")
    folder = KEPT / f"{name}-{key}"
    if (folder / "printed.json").exists():
        return folder
    for old in (*KEPT.glob(f"{name}-*"), folder):
        shutil.rmtree(old, ignore_errors=True)
    (folder / "work").mkdir(parents=True)
    log.info(f"running the {len(blocks)} blocks of {page}")
    printed = _run(page, blocks, folder / "work")
    (folder / "printed.json").write_text(json.dumps(printed), encoding="utf-8")
    return folder


def _state() -> str:
    """What the output depends on: the code, this Python and its packages."""
    found = hashlib.sha256(sys.version.encode())
    for top in CODE:
        for path in sorted((ROOT / top).rglob("*")):
            if path.is_file() and path.suffix not in (".pyc", ".so") and not path.parent.is_symlink():
                found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    found.update("".join(sorted(f"{d.metadata['Name']}=={d.version}\n" for d in distributions())).encode())
    return found.hexdigest()


def _run(page: str, blocks: list[dict[str, str]], folder: Path) -> list[dict[str, str]]:
    """What each block printed, or what it lacks."""
    missing = [_missing(block["needs"]) if "needs" in block else None for block in blocks]
    jobs = [_jobs(block) if lack is None else [] for block, lack in zip(blocks, missing, strict=True)]
    done = iter(_done(page, [job for part in jobs for job in part], folder))
    return [
        _shown(block, [(job, next(done)) for job in part]) if lack is None else {"missing": lack}
        for block, part, lack in zip(blocks, jobs, missing, strict=True)
    ]


def _jobs(block: dict[str, str]) -> list[dict[str, Any]]:
    """The commands of a block, as `run_commands` takes them; only the last may end with something else than 0."""
    if block["language"] == "python":
        return [{"code": block["body"], "line": block["body"], "expected": int(block.get("exit", 0))}]
    lines = [" ".join(line.split()) for line in block["body"].replace("\\\n", " ").splitlines() if line.strip()]
    jobs: list[dict[str, Any]] = [{"words": shlex.split(line, comments=True)[1:], "line": line, "expected": 0} for line in lines]
    jobs[-1]["expected"] = int(block.get("exit", 0))
    return jobs


def _done(page: str, jobs: list[dict[str, Any]], folder: Path) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each job."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, str(Path(__file__).with_name("run_commands.py"))]
    made = subprocess.run(
        command, input=json.dumps(jobs), cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if made.returncode:
        raise PluginError(f"the blocks of {page} cannot be run: {made.stderr}")
    done: list[tuple[int, str, str]] = json.loads(made.stdout)
    for job, (code, _, said) in zip(jobs, done, strict=False):
        if code != job["expected"]:
            raise PluginError(f"a block of {page} ended with {code}, not {job['expected']}: {job['line']}\n{said}")
    return done


def _shown(block: dict[str, str], done: list[tuple[dict[str, Any], tuple[int, str, str]]]) -> dict[str, str]:
    """What stands below a block: stdout, and where it was to fail what it said; behind its command where there are several."""
    told = [f"$ {job['line']}\n" * (len(done) > 1) + out + (err if job["expected"] else "") for job, (_, out, err) in done]
    lines = "\n".join(text.rstrip() for text in told).splitlines()
    few = int(block.get("tail", len(lines)))
    shown = lines if few >= len(lines) else ["...", *lines[len(lines) - few :]]
    ended = block.get("exit")
    return {"text": "\n".join([*shown, f"exit code {ended}"] if ended else shown)}


def _missing(name: str) -> str | None:
    """What a target, or else a package, lacks here."""
    try:
        return target.get(name).available()
    except UsageError:
        return None if find_spec(name) else f"The package '{name}' is not installed"
