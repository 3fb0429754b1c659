"""Whether a training run that is killed, wherever it is, resumes to the very files of a run that nobody disturbed.

python benchmarks/endurance_training.py [--kills 100] [--writes 100] [--together 12] [--commands 6] [--seed 0]

`--kills`: runs on the small digits by every method in turn are killed (SIGKILL) at moments drawn over their whole length, half of them again after they
were resumed. `--writes`: killed before a line of what writes files (toolchain/files.py), lines spread over all that a run executes there. `--together`: two
processes train together and both are killed, or one, whose partner then has to end with one sentence. `--commands`: the command itself, start included.
After each kill every file that has a name is read, and the run is resumed; in the end checkpoint.safetensors, last.safetensors and config.yaml must be
those of the undisturbed run byte for byte, metrics.jsonl and metrics.csv but for `seconds`, and nothing else may lie in the folder.
The last line of the output is all of it as JSON; exit code 1 where anything failed. Processes are forked from one that has torch: Linux only.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain import checkpoint, files, metrics
from toolchain.errors import ToolchainError
from toolchain.layers import FeedbackSNN, Limited, Neuron, Spectral, Standardized, TrainedThreshold
from toolchain.notation import table
from toolchain.train import CONFIG, LAST, train
from toolchain.versions import versions

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60.0
"""Seconds that anything may take."""

ENOUGH = 5
"""Failures after which no more runs are killed."""

SETTINGS: dict[str, Any] = {
    "train.dataset": "digits",
    "train.epochs": 3,
    "train.held_out": 1137,
    "train.optimizer": "adam",
    "train.lr": 0.01,
    "train.schedule": "cosine",
    "train.augment": {"crop": 1, "flip": True, "cutout": 0.5},
    "train.metrics": ["csv"],
}
NAMED = {"network.time_steps": 5, "network.feedback_steps": 10, "network.dropout": 0.1, "train.scale_factor": "auto"}
"""More for digits-fc; the small networks below have their own."""

WHERE = (
    "before the first checkpoint",
    "while it computed",
    "while it wrote a file",
    "between two files of an epoch",
    "after the last epoch",
)


NAMES = {"kill": "one process", "write": "one process, in files.py", "together": "two processes, both or one", "command": "the command"}


@dataclass(frozen=True)
class Case:
    """A training run: a network of the catalogue, or a small one for `method`."""

    method: str
    named: bool = False

    def run(self, folder: Path, *, resume: bool) -> None:
        if self.named:
            train("digits-fc", method=self.method, settings={**SETTINGS, **NAMED}, output=folder, device="cpu", resume=resume)
        else:
            train(network(self.method), method=self.method, settings=SETTINGS, output=folder, device="cpu", resume=resume)


CASES = [Case("spide", named=True), *(Case(method) for method in ("ide", "spide", "dsr", "ottt-a", "ottt-o", "saf-e", "saf-f"))]


def network(method: str) -> FeedbackSNN:
    """64-16-12-10 that `method` trains, with dropout."""
    torch.manual_seed(0)
    back = (1, 0, Limited(nn.Linear(12, 16, bias=False), Spectral()))
    online = {"neuron": Neuron(1.0, 0.0, leak=0.5), "weighted_readout": False, "input": Standardized(nn.Linear(64, 16)), "feedback": [back]}
    changes: dict[str, dict[str, Any]] = {
        "ide": {"input": nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16)), "feedback": [back], "neuron": Neuron(2.0, 0.0)},
        "spide": {"feedback": [back], "feedback_steps": 10},
        "dsr": {"hidden": [nn.Linear(16, 10)], "readout": None, "trained_threshold": TrainedThreshold(2.0)},
        "saf-f": {"neuron": Neuron(1.0, 0.0, leak=0.9)},
    }
    parts: dict[str, Any] = {"input": nn.Linear(64, 16), "hidden": [nn.Linear(16, 12)], "readout": nn.Linear(12, 10)}
    return FeedbackSNN(name="small", input_shape=(1, 8, 8), time_steps=5, dropout=0.2, **{**parts, **changes.get(method, online)})


# ---- processes forked from this one


class Child:
    """A process that does `work` and leaves with the exit code of what went wrong; what it says goes to `log`."""

    def __init__(self, log: Path, work: Callable[[], object]) -> None:
        self.log = log
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._work(work)

    def _work(self, work: Callable[[], object]) -> None:
        code = 1
        try:
            os.dup2(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            work()
            code = 0
        except ToolchainError as error:
            print(f"toolchain: {error}", file=sys.stderr)
            code = error.exit_code
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 70
        finally:
            sys.stderr.flush()
            os._exit(code)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def ended(self, seconds: float) -> bool:
        """Whether it has ended, or does within `seconds`; then `code` is its exit code, negative after a signal."""
        until = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= until:
                return False
            else:
                time.sleep(0.002)
        return True

    def finish(self) -> int | None:
        """The exit code; -SIGKILL where it had to be killed for taking too long."""
        if not self.ended(PATIENCE):
            self.kill()
            self.ended(PATIENCE)
        return self.code

    def sentences(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if not line.startswith("epoch ")]


def pair(folder: Path, log: Path, case: Case, *, resume: bool) -> list[Child]:
    """Two processes that train together, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> None:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "RANK": str(rank),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        case.run(folder, resume=resume)

    return [Child(log.with_suffix(f".{rank}"), lambda rank=rank: work(rank)) for rank in (0, 1)]


class Command(Child):
    """The command `toolchain train`, from its first import."""

    def __init__(self, log: Path, folder: Path, *, resume: bool) -> None:
        words = [word for name, value in {**SETTINGS, **NAMED}.items() for word in ("--set", f"{name}={json.dumps(value)}")]
        command = [sys.executable, "-m", "toolchain", "train", "digits-fc", *words, "--device", "cpu", "-o", str(folder)]
        command += ["--resume"] * resume
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with log.open("w") as stream:
            # waited for by its number, as the others are
            self.pid = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stream, env=environment).pid
        self.log, self.code = log, None


# ---- what a folder holds


def begun(folder: Path) -> bool:
    """Whether there is something to resume; a run that is killed before leaves no trace but an empty metrics.jsonl."""
    return (folder / CONFIG).exists()


def where(folder: Path, epochs: int) -> str:
    """What a killed run was at, as its folder tells; every file that has a name must be whole (else its reader raises)."""
    read = {name: checkpoint.read(folder / name) for name in (LAST, checkpoint.NAME) if (folder / name).exists()}
    if LAST not in read:
        return WHERE[0]
    done = read[LAST].about.epoch
    lines = metrics.read(folder / metrics.LINES, done)
    if done == epochs:
        return WHERE[4]
    if list(folder.glob(".*.part")):
        return WHERE[2]
    listed = len((folder / metrics.LINES).read_text().splitlines())
    return WHERE[3] if listed > len(lines) or read[checkpoint.NAME].about.epoch > done else WHERE[1]


def differences(folder: Path, whole: Path) -> list[str]:
    """The names of files that are not those of the undisturbed run."""
    names = {path.name for path in folder.iterdir()} ^ {path.name for path in whole.iterdir()}
    names |= {name for name in (checkpoint.NAME, LAST, CONFIG) if (folder / name).read_bytes() != (whole / name).read_bytes()}
    names |= {name for name in (metrics.LINES, metrics.TABLE) if _timeless(folder / name) != _timeless(whole / name)}
    return sorted(names)


def _timeless(path: Path) -> list[dict[str, Any]]:
    with path.open() as stream:
        rows = list(csv.DictReader(stream)) if path.suffix == ".csv" else [json.loads(line) for line in stream]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# ---- trials


@dataclass
class Trial:
    """One run from its first process to its last: where it was killed, and what is wrong in the end."""

    kind: str
    method: str
    killed: list[str]
    problem: str | None = None


class Trials:
    """All trials of a session; undisturbed runs are made once for each kind and case."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw, self.numbers = folder, random.Random(seed), count()
        self.undisturbed: dict[tuple[str, Case], tuple[Path, float]] = {}
        self.found: list[Trial] = []
        self.executed = 0  # lines of files.py in a run

    def start(self, kind: str, case: Case, folder: Path, *, resume: bool) -> list[Child]:
        log = self.folder / f"log-{next(self.numbers)}"
        if kind == "command":
            return [Command(log, folder, resume=resume)]
        if kind == "together":
            return pair(folder, log, case, resume=resume)
        return [Child(log, lambda: case.run(folder, resume=resume))]

    def whole(self, kind: str, case: Case) -> tuple[Path, float]:
        """The folder of an undisturbed run, and the seconds it took."""
        if (kind, case) not in self.undisturbed:
            folder, began = self.folder / f"whole-{next(self.numbers)}", time.monotonic()
            children = self.start(kind, case, folder, resume=False)
            if [child.finish() for child in children] != [0] * len(children):
                raise SystemExit(f"a run that nobody disturbs fails: {children[0].log.read_text()}")
            self.undisturbed[kind, case] = folder, time.monotonic() - began
        return self.undisturbed[kind, case]

    def disturbed(self, kind: str, case: Case, again: bool) -> int:
        """Kill a run at a random moment, `again` after its first resume, and let it come to its end; how often it was killed before that."""
        whole, length = self.whole(kind, case)
        folder, trial = self.folder / f"run-{next(self.numbers)}", Trial(kind, case.method, [])
        while len(trial.killed) < 1 + again and trial.problem is None:
            children = self.start(kind, case, folder, resume=begun(folder))
            if children[0].ended(self.draw.uniform(0, length)):
                for child in children:
                    child.finish()
                break  # it was done before
            trial.problem = self.strike(children, folder, kind == "together" and self.draw.random() < 0.5)
            trial.killed.append(where(folder, SETTINGS["train.epochs"]))
        if trial.killed:
            self.found.append(trial)
            if trial.problem is None:
                self.finish(trial, case, folder, whole)
        return len(trial.killed)

    def strike(self, children: list[Child], folder: Path, one: bool) -> str | None:
        """Kill all, or one of two, whose partner has to end by itself, with a sentence where it was in the training; what is wrong then."""
        if one:
            self.draw.shuffle(children)
        for child in children[:1] if one else children:
            if not child.ended(0):
                child.kill()
        for child in children[:1] if one else children:
            child.finish()
        if not one:
            return None
        left = children[1]
        if not left.ended(PATIENCE / 2) and not begun(folder):
            left.kill()  # it waits to be joined, for half an hour; torchrun does not let it
            left.finish()
            return None
        code, said = left.finish(), left.sentences()
        ready = code == 0 and not said  # it had nothing left to do with the other
        alone = code == 1 and len(said) == 1 and "another process of this training is gone" in said[0]
        unmet = code == 2 and len(said) == 1 and "the processes cannot find each other" in said[0]
        return None if ready or alone or unmet else f"the partner of a killed process ended with {code}: {said}"

    def written(self, case: Case, number: int) -> None:
        """Kill a run `number` of them before a line of files.py that an undisturbed run executes, spread over all."""
        whole, _ = self.whole("write", case)
        self.executed = lines = self.lines(case)
        for index in range(number):
            folder, trial = self.folder / f"run-{next(self.numbers)}", Trial("write", case.method, [])
            self.found.append(trial)
            at = index * lines // number + self.draw.randrange(max(1, lines // number))
            child = Child(self.folder / "log", lambda at=at, folder=folder: (_count_lines(at), case.run(folder, resume=False)))
            if child.finish() != -signal.SIGKILL:
                trial.problem = f"line {at} of {lines} was not reached: {child.log.read_text()}"
                continue
            trial.killed.append(where(folder, SETTINGS["train.epochs"]))
            self.finish(trial, case, folder, whole)

    def lines(self, case: Case) -> int:
        """How many lines of files.py a run executes."""
        told, folder = self.folder / "lines", self.folder / f"run-{next(self.numbers)}"

        def work() -> None:
            seen = _count_lines(None)
            case.run(folder, resume=False)
            told.write_text(str(len(seen)))

        if Child(self.folder / "log", work).finish():
            raise SystemExit(f"a run whose lines are counted fails: {(self.folder / 'log').read_text()}")
        return int(told.read_text())

    def finish(self, trial: Trial, case: Case, folder: Path, whole: Path) -> None:
        """Let a killed run come to its end, and compare."""
        children = self.start(trial.kind, case, folder, resume=begun(folder))
        if [child.finish() for child in children] != [0] * len(children):
            trial.problem = f"the resumed run fails: {children[0].log.read_text()}"
            return
        wrong = differences(folder, whole)
        trial.problem = f"not as in the undisturbed run: {', '.join(wrong)}" if wrong else None


def _count_lines(last: int | None) -> list[None]:
    """From now on note every line of files.py that this process executes; it kills itself before number `last`."""
    seen: list[None] = []

    def line(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            if len(seen) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(None)
        return line

    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename == files.__file__ else None)
    return seen


def tabulated(found: list[Trial]) -> list[list[str]]:
    rows = []
    for kind in dict.fromkeys(trial.kind for trial in found):
        mine = [trial for trial in found if trial.kind == kind]
        places = Counter(place for trial in mine for place in trial.killed)
        wrong = sum(trial.problem is not None for trial in mine)
        rows.append([NAMES[kind], str(len(mine)), str(places.total()), *(str(places[place]) for place in WHERE), str(wrong)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--writes", type=int, default=100)
    parser.add_argument("--together", type=int, default=12)
    parser.add_argument("--commands", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)  # a forked process has no other
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        CASES[0].run(Path(name) / "warm", resume=False)  # what is imported here no forked process imports again
        trials = Trials(Path(name), asked.seed)
        for kind, number, cases in (
            ("kill", asked.kills, CASES),
            ("together", asked.together, CASES[:2]),
            ("command", asked.commands, CASES[:1]),
        ):
            made, turn = 0, cycle(cases)
            while made < number and sum(trial.problem is not None for trial in trials.found) < ENOUGH:
                made += trials.disturbed(kind, next(turn), again=made + 1 < number and trials.draw.random() < 0.5)
        if asked.writes:
            trials.written(CASES[0], asked.writes)
        found = trials.found
        shortest: dict[str, float] = {}
        for (kind, _), (_, seconds) in trials.undisturbed.items():
            shortest[NAMES[kind]] = min(seconds, shortest.get(NAMES[kind], seconds))
    problems = [f"{trial.kind}, {trial.method}, killed {' and '.join(trial.killed)}: {trial.problem}" for trial in found if trial.problem]
    print(
        f"training runs of {SETTINGS['train.epochs']} epochs killed and resumed, seed {asked.seed}, {time.monotonic() - began:.0f} s in all; undisturbed "
        f"a run takes {', '.join(f'{seconds:.1f} s ({kind})' for kind, seconds in shortest.items())}"
        + (f", and executes {trials.executed} lines of files.py" if trials.executed else "")
    )
    print("\n".join(table(["killed", "runs", "kills", *WHERE, "not identical"], tabulated(found))))
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
    print("\n".join([f"{machine}; " + ", ".join(f"{name} {version}" for name, version in versions().items()), *problems]))
    print(
        json.dumps(
            {
                "seed": asked.seed,
                "machine": machine,
                "versions": versions(),
                "trials": [vars(trial) for trial in found],
                "problems": problems,
            }
        )
    )
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
