"""Every block of docs/methods.md runs, and every method has its section."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from toolchain.methods import NAMES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text()
SECTIONS = {
    title: re.findall(r"```python\n(.*?)```", body, re.S) for title, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
}


@pytest.mark.parametrize("title", [title for title, blocks in SECTIONS.items() if blocks])
def test_the_code_of_a_section_runs(title: str, capsys: pytest.CaptureFixture[str]) -> None:
    for block in SECTIONS[title]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(compile(block, title, "exec"), {"__name__": "page"})
    assert capsys.readouterr().out or title == "Networks"


def test_every_method_has_a_section() -> None:
    titles = {title.lower().replace("_", "-") for title, blocks in SECTIONS.items() if blocks}
    assert set(NAMES) <= titles
