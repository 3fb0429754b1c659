"""What the tests of hostile files share: the scripts that make them, good files to put beside them, and a command given in this process."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from toolchain import cli

FOLDER = Path(__file__).parent


@pytest.fixture(scope="session")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The modules of this folder, which is no package."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: __import__(name) for name in ("make", "of_data", "of_runs")}
    finally:
        sys.path.remove(str(FOLDER))


@dataclass(frozen=True)
class Answer:
    """What a command left: its exit code and both streams."""

    code: int
    out: str
    err: str


RUNS_CODE = {
    "pickle.find_class",
    "marshal.loads",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "urllib.Request",
}
"""What Python reports where a file's code would run or call home. The imports of libraries do some of it themselves and are left out."""


@dataclass
class Watch:
    """What of `RUNS_CODE` happened while it was on."""

    on: bool = False
    seen: list[str] = field(default_factory=list)

    def __call__(self, event: str, _: object) -> None:
        if self.on and event in RUNS_CODE and not importing():
            self.seen.append(event)


def importing() -> bool:
    """Whether a module is being imported, and not a file read."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@pytest.fixture(scope="session")
def watch() -> Watch:
    """An audit hook, which Python never takes off again; it is off between commands."""
    made = Watch()
    sys.addaudithook(made)
    return made


@pytest.fixture(scope="session")
def verbs() -> Any:
    """The command line's verbs: made once, since a hundred commands follow."""
    return typer.main.get_command(cli.app)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands keep what they have found so far."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    cache: Path,
    verbs: Any,
    watch: Watch,
) -> Callable[..., Answer]:
    """Give a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(typer.main, "get_command", lambda app: verbs)
    monkeypatch.delenv("TOOLCHAIN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))

    def give(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["toolchain", *words])
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        capfd.readouterr()
        watch.seen.clear()
        watch.on = True
        try:
            with pytest.raises(SystemExit) as left:
                cli.main()
        finally:
            watch.on = False
        for number, action in before.items():
            signal.signal(number, action)
        out, err = capfd.readouterr()
        return Answer(left.value.code or 0, out, err)

    return give


@pytest.fixture(scope="session")
def small(scripts: dict[str, ModuleType]) -> Callable[[tuple[int, ...], str], bytes]:
    """`small(shape, dataset)`: a good checkpoint that takes samples of this shape."""
    import numpy as np

    runs = scripts["of_runs"]

    def made(shape: tuple[int, ...], dataset: str) -> bytes:
        size = int(np.prod(shape))
        network = runs.network(input_shape=list(shape), input={"type": "linear", "inputs": size, "outputs": 3})
        weights = runs.weights(input__weight=np.zeros((3, size), "<f4"))
        content: bytes = runs.checkpoint(weights, runs.about(config=runs.config(network, dataset=dataset)))
        return content

    return made


@pytest.fixture(scope="session")
def run_folder(scripts: dict[str, ModuleType]) -> dict[str, bytes]:
    """A good run after one of two epochs, and its configuration: what `toolchain train config.yaml --resume -o run` takes."""
    import json

    runs = scripts["of_runs"]
    line = dict.fromkeys(runs.LINE, 0.5) | {"epoch": 1}
    return {
        "config.yaml": json.dumps(runs.config()).encode(),
        "run/checkpoint.safetensors": runs.checkpoint(runs.weights(), runs.about()),
        "run/last.safetensors": runs.checkpoint(runs.last(), runs.about()),
        "run/metrics.jsonl": json.dumps(line).encode() + b"\n",
    }
