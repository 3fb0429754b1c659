"""Every command of docs/training.md runs, in order, in one folder."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import msgspec

from toolchain.config import Training

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text()


def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    commands = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
    assert len(commands) == 6
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"--master-addr 127.0.0.1 --master-port {free.getsockname()[1]}"
    starts = {"toolchain": f"{sys.executable} -m toolchain", "torchrun": f"{sys.executable} -m torch.distributed.run {place}"}
    outside = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {**outside, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    for command in commands:
        verb, _, rest = command.partition(" ")
        done = subprocess.run(
            f"{starts[verb]} {rest}", shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, (command, done.stderr)
        assert "digits" in done.stdout
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["adam", "adam-1", "first", "two"]


def test_every_setting_that_the_page_names_is_one() -> None:
    known = {field.name for field in msgspec.structs.fields(Training)}
    assert set(re.findall(r"train\.(\w+)", re.sub(r"toolchain\.train\(|`toolchain\.train`", "", PAGE))) <= known
