"""The documentation's pages: they build strictly, every block marked `run` runs, links and pictures resolve, the references are complete, and nothing is loaded from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer
import yaml

import toolchain
from toolchain import cli, errors, models

pytest.importorskip("mkdocs", reason="mkdocs is not installed")
pytest.importorskip("material", reason="mkdocs-material is not installed")

ROOT = Path(__file__).resolve().parents[2]
MADE = {"commands.md", "networks.md", "python.md"}  # by the hooks, while the pages are built


class Found(HTMLParser):
    """What a page links to, loads, and can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(given.get("href", ""))
        elif tag in ("script", "img", "iframe", "source", "video", "object"):
            self.loaded += [given[name] for name in ("src", "data") if given.get(name)]


def built(place: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1"}
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place)]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    done = built(place)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Found]:
    return {path: Found(path.read_text("utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}


@pytest.mark.slow
def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Found]) -> None:
    broken = []
    for page, found in pages.items():
        for link in (*found.links, *found.loaded):
            to, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", to) or (not to and not anchor):
                continue
            target = (page.parent / unquote(to)).resolve() if to else page
            if not target.is_file() or (anchor and target in pages and unquote(anchor) not in pages[target].anchors):
                broken.append(f"{page.relative_to(site)}: {link}")
    assert broken == []


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Found]) -> None:
    assert [link for found in pages.values() for link in found.loaded if re.match(r"(?!data:)[a-z]+:|//", link)] == []
    styles = [path.read_text("utf-8") for path in site.rglob("*.css")]
    assert [
        to
        for style in styles
        for to in re.findall(r"url\(([^)]*)\)|@import\s+(\S+)", style)
        if re.match(r"['\"]?(?!data:)[a-z]+:|['\"]?//", to[0] or to[1])
    ] == []


@pytest.mark.slow
def test_the_references_are_complete(pages: dict[Path, Found], site: Path) -> None:
    verbs = [verb for verb in typer.main.get_command(cli.app).commands.values() if not verb.hidden]
    assert {verb.name for verb in verbs} <= pages[site / "commands.html"].anchors
    assert {name for name in toolchain.__all__ if not name.startswith("__")} <= pages[site / "python.html"].anchors
    text = (site / "commands.html").read_text("utf-8")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ToolchainError)]
    assert [kind for kind in kinds if f"<code>{kind.__name__}</code>" not in text] == []
    flags = [flag for verb in verbs for option in verb.params for flag in option.opts if flag.startswith("-")]
    assert [flag for flag in flags if flag not in text] == []
    linked = pages[site / "networks.html"].links
    assert [name for name in models.names() if f"source/models/{models.get(name).module}.py.html" not in linked] == []


@pytest.mark.slow
def test_the_tutorial_shows_what_its_commands_printed_and_its_pictures(site: Path, pages: dict[Path, Found]) -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text()
    text = (site / "tutorial.html").read_text("utf-8")
    assert text.count('class="language-text printed') + text.count("Not run when") == len(re.findall(r"^```\w+ run", page, re.M))
    wanted = re.findall(r"^<!-- (?:picture|file) (\S+):", page, re.M)
    assert wanted
    assert [path for path in wanted if not (site / "tutorial-files" / path).is_file()] == []


def test_every_page_is_in_the_navigation() -> None:
    described = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = set(re.findall(r"'([^']+\.md)'", str(described["nav"])))
    assert {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} | MADE == listed


def test_what_the_hooks_make_is_not_in_the_repository() -> None:
    listed = subprocess.run(["git", "ls-files", "docs", "site"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert {f"docs/{page}" for page in MADE} & set(listed) == set()
    assert [path for path in listed if path.startswith("site/") or path.endswith((".png", ".html"))] == []


@pytest.mark.parametrize(
    "section", re.split(r"^## ", (ROOT / "docs" / "results.md").read_text(), flags=re.M), ids=lambda text: text.partition("\n")[0]
)
def test_every_section_of_the_results_has_its_command(section: str) -> None:
    if re.search(r"^\|-|^\| ---", section, re.M):
        assert re.search(r"`(make [a-z-]+|toolchain [a-z]+|python benchmarks/)", section)
