"""`.ci/audit`: what it makes of pip-audit's answers, planted here, and of none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FLAW = {"id": "PYSEC-2099-1", "aliases": ["CVE-2099-77"], "fix_versions": ["1.1"], "description": "A file can stop it."}
ACCEPTED = {"id": "GHSA-some-where", "aliases": ["CVE-2025-32434"], "fix_versions": ["2.6.0"], "description": "torch.load"}


class Audit:
    """`.ci/audit` on two pins, with a pip-audit that says what a test plants."""

    def __init__(self, folder: Path) -> None:
        self.program, self.pins = folder / "pip-audit", folder / "pins.txt"
        self.pins.write_text("# two\none==1.0\ntwo==2.0\n")

    def __call__(self, said: str, *, code: int = 0, stderr: str = "") -> tuple[int, str, str]:
        self.program.write_text(f"#!/bin/sh\ncat <<'SAID'\n{said}\nSAID\ncat >&2 <<'SAID'\n{stderr}\nSAID\nexit {code}\n")
        self.program.chmod(0o755)
        command = [sys.executable, str(ROOT / ".ci" / "audit"), str(self.program), str(self.pins)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def audit(tmp_path: Path) -> Audit:
    return Audit(tmp_path)


def answers(*dependencies: dict[str, Any]) -> str:
    return json.dumps({"dependencies": dependencies, "fixes": []})


def answer(name: str, version: str, *flaws: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "version": version, "vulns": list(flaws)}


def skipped(name: str) -> dict[str, Any]:
    return {"name": name, "skip_reason": f"Dependency not found and could not be audited: {name}"}


def test_nothing_known_is_0(audit):
    code, said, _ = audit(answers(answer("one", "1.0"), answer("two", "2.0")))
    assert code == 0
    assert said.splitlines() == [
        "pins.txt: 2 of 2 versions looked up, 0 known vulnerabilities, 0 more accepted",
        "audit: all 2 pinned versions were looked up, and nothing is known about them that is not accepted",
    ]


def test_a_vulnerability_is_named_with_its_way_out(audit):
    code, said, _ = audit(answers(answer("one", "1.0", FLAW), skipped("two")), code=1)
    assert code == 1
    assert "pins.txt: one 1.0 has PYSEC-2099-1 CVE-2099-77, mended in 1.1: A file can stop it." in said
    assert "pins.txt: 1 of 2 versions looked up, 1 not (Dependency not found and could not be audited), 1 known" in said
    assert said.splitlines()[-1].startswith("audit: 1 known vulnerabilities: pin a version without, or say in constraints/accepted.toml")


def test_an_accepted_one_is_shown_with_its_reason_by_any_of_its_names(audit):
    code, said, _ = audit(answers(answer("one", "1.0", ACCEPTED), answer("two", "2.0")), code=1)
    assert code == 0
    assert "pins.txt: one 1.0 has GHSA-some-where, accepted: torch before 2.6.0" in said


def test_an_index_that_does_not_answer_about_vulnerabilities_is_not_a_clean_bill(audit):
    """What pip-audit calls "No known vulnerabilities found", with exit code 0."""
    code, said, _ = audit(answers(skipped("one"), skipped("two")))
    assert code == 3
    assert (
        said.splitlines()[-1]
        == "audit: nothing was checked, for pypi answered about none of the 2 pinned versions: run make audit where it does"
    )
    code, said, _ = audit(answers(answer("one", "1.0"), skipped("two")))
    assert code == 3
    assert said.splitlines()[-1] == "audit: 1 of 2 pinned versions were not checked, and nothing is known about the others"


def test_no_network_is_said_and_not_a_clean_bill(audit):
    code, said, _ = audit("", code=1, stderr="Traceback (most recent call last):\nConnectionError: no such host")
    assert code == 3
    assert "2 not (ConnectionError: no such host)" in said


def test_a_pip_audit_of_other_options_or_none_at_all_is_an_error(audit):
    code, _, said = audit("", code=2, stderr="usage: pip-audit\npip-audit: error: unrecognized arguments: --no-deps")
    assert (code, said) == (2, "audit: pip-audit ended with 2: pip-audit: error: unrecognized arguments: --no-deps\n")
    audit.program.unlink()
    command = [sys.executable, str(ROOT / ".ci" / "audit"), str(audit.program), str(audit.pins)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, f"audit: {audit.program} does not run: No such file or directory\n")


def test_what_is_accepted_is_not_called_here():
    accepted = tomllib.loads((ROOT / "constraints" / "accepted.toml").read_text())
    names = {name for reason in accepted.values() for name in re.findall(r"torch\.[a-z]+(?:\.[a-z]+)?", reason)}
    assert names == {"torch.load", "torch.jit.script"}
    sources = [path for folder in ("toolchain", "targets", "models", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 100
    calls = re.compile(
        r"(?<![\w.])(" + "|".join(re.escape(name) for name in names) + r")\b|from torch(\.jit)? import .*\b(load|jit|script)\b"
    )
    assert [str(path) for path in sources if calls.search(path.read_text())] == []
