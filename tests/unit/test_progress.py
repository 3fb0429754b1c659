"""What is said to a person at a terminal cannot steer it, whatever a file calls itself."""

from __future__ import annotations

import json

import pytest

from toolchain.progress import say, track, visible


@pytest.mark.parametrize("character", ["\x1b", "\x07", "\r", "\x00", "\x9b", "\u202e", "\u2028", "\udcff"])
def test_what_steers_a_terminal_is_written_out(character: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert visible(f"a{character}b") == f"a\\u{ord(character):04x}b"
    say(f"a{character}b")
    assert capsys.readouterr().err == f"a\\u{ord(character):04x}b\n"


def test_other_text_stays_as_it_is() -> None:
    text = "Schicht ß 层 'a'\n\tx [bold] \\u001b"
    assert visible(text) == text


def test_json_says_the_same() -> None:
    name = "a\x9b\u202e\x1b"
    text = json.dumps(name, ensure_ascii=False)
    assert json.loads(visible(text)) == name


@pytest.mark.parametrize("label", ["x[/] on sim", "[red]x", "\x1b[2Jx on sim"])
def test_a_bar_shows_a_label_as_it_is(label: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(track(range(3), label)) == [0, 1, 2]
    shown = capsys.readouterr().err
    assert visible(label) in shown
    assert "\x1b[2J" not in shown
