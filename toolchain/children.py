"""Child processes of ours end with their parent, so any process may start them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

LOOK = 0.25
"""Seconds between two looks of a child at its parent."""


def end_with(parent: int) -> None:
    """From now on this process ends when process `parent`, which started it, is gone, however that went."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """A child forked here never sees Ctrl-C, and a daemonic process (a worker of a pool or a cluster) may fork it.

    multiprocessing forbids those to have children, which would outlive them: ours call `end_with`.
    """
    config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # there is no other way to say it
    daemonic = config.pop("daemon", None)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if daemonic is not None:
            config["daemon"] = daemonic
