"""Coverage-guided inputs by atheris: what reaches new branches of the toolchain's Python code is kept and mutated further, by libFuzzer and by our mutators.

python -m fuzz.guided TARGET [--inputs 20000] [--seed 0] [--out out/fuzz]

atheris is no dependency: `pip install atheris`. It lasts as long as its inputs take in one process, in which what breaks a bound ends the run.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

MISSING = "atheris is not installed: run `pip install atheris`, or leave the guidance to the campaign's own mutators (python -m fuzz)"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fuzz.guided", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target")
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"))
    asked = parser.parse_args()
    if find_spec("atheris") is None:
        raise SystemExit(MISSING)
    atheris: Any = import_module("atheris")
    with atheris.instrument_imports(include=["toolchain"]):
        from fuzz import table
    from fuzz.judge import Judge
    from fuzz.mutate import BYTES

    target, began = table.target(asked.target), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, atheris.instrument_imports(include=["toolchain"]):
        folder, corpus = Path(scratch) / "work", Path(scratch) / "corpus"
        for each in (folder, corpus):
            each.mkdir()
        prepared = target.prepare(folder)
        judge, found = Judge(prepared), Counter[str]()
        for number, seed in enumerate(prepared.seeds):
            judge(seed)
            (corpus / str(number)).write_bytes(seed)

        def one(data: bytes) -> None:
            finding = judge(data)
            if finding is not None:
                found[finding.what] += 1
                asked.out.mkdir(parents=True, exist_ok=True)
                path = asked.out / f"{target.name}-guided-{asked.seed}-{judge.tally.inputs}"
                path.with_suffix(".input").write_bytes(data)
                path.with_suffix(".txt").write_text(f"{finding.what}\n\n{finding.detail}\n", errors="backslashreplace")
            if judge.tally.inputs >= asked.inputs:  # libFuzzer leaves by its own exit, which runs nothing of ours
                tally = judge.tally
                print(
                    f"{target.name}, guided by coverage: {tally.inputs:,} inputs, {tally.accepted:,} accepted, {tally.refused:,} refused, {found.total()} findings, "
                    f"worst {tally.milliseconds:,.0f} ms, {len(list(corpus.iterdir())):,} inputs kept, {time.monotonic() - began:,.0f} s",
                    flush=True,
                )
                for what, count in found.most_common():
                    print(f"{count} x {what}", flush=True)
                os._exit(1 if found else 0)

        def changed(data: bytes, most: int, seed: int) -> bytes:
            random = Random(seed)
            if random.random() < 0.5:
                mutated: bytes = atheris.Mutate(data, most)
                return mutated
            return random.choice([*prepared.mutators, *prepared.mutators, *BYTES])(data, random)[:most]

        options = [f"-seed={asked.seed + 1}", f"-timeout={int(target.seconds)}", "-rss_limit_mb=0", "-max_len=65536", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=changed)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
