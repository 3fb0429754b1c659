"""The report's sections about the inside of a network, from a comparison that ran."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

import toolchain
from toolchain.report import inside, write
from toolchain.report.page import Page


@pytest.fixture(scope="module")
def found():
    return toolchain.compare("digits-fc", targets=("torch", "sim"), dataset="digits", samples=64, device="cpu", budget_samples=0)


@pytest.fixture(scope="module")
def page(found, tmp_path_factory):
    return write(found, [], tmp_path_factory.mktemp("report"))


def test_all_three_sections_are_there_and_say_the_worst_and_the_suggested(found, page):
    text = page.read_text()
    for words in ("Where in the network integers err", "When rates settle", "How true the gradient is"):
        assert f"<h2>{words}</h2>" in text
    plain = re.sub(r"<[^>]+>", "", text).replace("&#x27;", "'")
    assert found.inside.populations.sentence() in plain
    assert found.inside.populations.sentence("feedback") in plain
    assert found.inside.settling.sentence() in plain
    assert found.inside.settling.sentence("feedback") in plain
    assert found.fidelity.sentence.removeprefix("least") in plain
    assert "The neurons that err most" in plain


def test_every_picture_lies_beside_the_page(page):
    names = {path.stem for path in page.parent.glob("*.png")}
    pictures = {f"{what}-{phase}" for what in ("populations", "residual", "answers") for phase in ("forward", "feedback")}
    assert pictures | {"fidelity-spide", "fidelity-exact"} <= names
    for name in pictures:
        assert "mathdefault" not in (page.parent / f"{name}.svg").read_text()


def test_equal_numbers_give_equal_bytes(found, page):
    parts, drawn = sections(found)
    text = page.read_text()
    assert all(part in text for part in parts)
    for name, picture in drawn.items():
        assert (page.parent / f"{name}.png").read_bytes() == picture.png
        assert (page.parent / f"{name}.svg").read_bytes() == picture.svg


def sections(comparison):
    """The three sections alone, and the pictures they drew."""
    page = Page(tuple(row.deployment.target for row in comparison.rows))
    return [part(page, comparison) for part in (inside.populations, inside.settling, inside.fidelity)], page.drawn


def test_what_is_not_known_has_no_section(found):
    assert sections(replace(found, inside=None, fidelity=None)) == (["", "", ""], {})
    errors, settling, _ = sections(replace(found, inside=replace(found.inside, populations=None), fidelity=None))[0]
    assert errors == ""
    assert "When rates settle" in settling


def test_no_exact_gradient_is_said_with_its_reason(found):
    solved = replace(found.fidelity.solved, reason="the rates of 'x' do not come to an equilibrium: residual 0.1 after 9 iterations")
    parts, drawn = sections(replace(found, inside=None, fidelity=replace(found.fidelity, exact={}, masks={}, solved=solved)))
    assert "No exact gradient: the rates of &#x27;x&#x27; do not come to an equilibrium" in parts[2]
    assert list(drawn) == ["fidelity-spide"]


def test_curves_that_end_in_nothing_or_never_settle_can_be_drawn(found):
    """Zeros have no logarithm, and a residual above its tolerance suggests no number of steps."""

    def changed(curve):
        nothing, much = (0.0,) * len(curve.steps), (2.0,) * len(curve.steps)
        return replace(curve, whole=nothing, relative=much, cosine=None, residual=dict.fromkeys(curve.residual, nothing))

    settling = replace(found.inside.settling, curves=tuple(changed(curve) for curve in found.inside.settling.curves))
    parts, drawn = sections(replace(found, inside=replace(found.inside, settling=settling, populations=None), fidelity=None))
    assert "no T_B up to 200 suggested" in parts[1]
    assert list(drawn) == ["residual-forward", "answers-forward", "residual-feedback"]
