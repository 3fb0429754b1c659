"""Runs commands of `toolchain` and Python, each in a fork of one process: what takes every command a second to import is imported once.

stdin is a JSON list of jobs, `{"words": [...]}` after `toolchain` or `{"code": ...}`, with the exit code that is `expected`; stdout becomes a list of `[exit code, stdout,
stderr]`, which ends with the first job that left otherwise.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from tempfile import TemporaryFile
from typing import Any

import matplotlib.pyplot  # noqa: F401  imported for the children, as torch is by `cli`'s functions
import torch  # noqa: F401

import toolchain
from toolchain import cli


def main() -> None:
    for name in toolchain.__all__:
        getattr(toolchain, name)
    gc.freeze()  # else every child takes half a second at its end to look through what it never touched
    done: list[tuple[int, str, str]] = []
    for job in json.load(sys.stdin):
        with TemporaryFile() as out, TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                execute(job)
                return
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out.seek(0)
            err.seek(0)
            done.append((code, out.read().decode(), err.read().decode()))
        if code != job["expected"]:
            break
    json.dump(done, sys.stdout)


def execute(job: dict[str, Any]) -> None:
    """In a child, whose end is the interpreter's own."""
    if "code" in job:
        exec(compile(job["code"], "<page>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = ["toolchain", *job["words"]]
    cli.main()


if __name__ == "__main__":
    main()
