"""Run by test_lava_endings as a process of its own: starts a network, says its children's pids, and runs until somebody ends it."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def main() -> None:
    spec = spec_from_file_location("fixtures", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    fixtures = module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    from toolchain.passes.retime import Retime
    from toolchain.targets.lava_sim import LavaSim

    graph = Retime()(fixtures._random_graph(3, couples=2))
    inputs, _ = fixtures._random_inputs(graph, 4)
    if sys.argv[1] == "unclosed":
        run = LavaSim().compile(graph)
        run.run(inputs)
        print("ran", flush=True)
        return
    with LavaSim(batch=2).compile(graph) as run:
        run.run(inputs)
        print(*(child.pid for child in run._network._runtime.children), flush=True)
        while True:
            run.run(inputs.repeat(200, axis=0))


main()
