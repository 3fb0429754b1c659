"""Write every hostile file anew: `python tests/hostile/make.py` fills tests/hostile/files, and prints what is hostile about each."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import of_artefacts
import of_data
import of_exchange
import of_runs

FILES = Path(__file__).with_name("files")


def made() -> of_artefacts.Made:
    """(name, what is hostile about it, bytes) of each file."""
    return chain(of_artefacts.files(), of_runs.files(), of_data.files(), of_exchange.files())


if __name__ == "__main__":
    FILES.mkdir(exist_ok=True)
    for old in FILES.iterdir():
        old.unlink()
    for name, what, content in made():
        (FILES / name).write_bytes(content)
        print(f"{name:<36} {what}")
