"""Other people's simulators on the networks of `simulation.py`, in a process and an environment of their own (`make peers`): SpikingJelly, snnTorch and plain torch.

python benchmarks/peers.py        (reads one JSON request a line from stdin and answers each with one line; started by `simulation.py`)

A network comes as an .npz file of integer weights, so the toolchain need not be installed here. It holds the weights and potentials as float32, which is exact below 2^24.
All peers run step by step, since their multi-step modes cannot express feedback from the last population to the first; weights, images and spikes of
convolutions are channels_last, and the readout, which never fires, is applied once, to the spike counts. They count the spikes of the last population only, unless asked for all.

Neurons here fire at `threshold` and subtract `reset`; those of the libraries subtract the potential they fire at. A potential that starts
at reset - threshold and fires at `reset` spikes at the same steps: u + reset - threshold >= reset where u >= threshold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Run = Callable[..., "tuple[Tensor, list[Tensor | None]]"]


class Neurons(NamedTuple):
    """A population: its shape without the samples, and when it fires."""

    shape: tuple[int, ...]
    threshold: float
    reset: float


class Network(NamedTuple):
    """Populations in their order, the connections into each from (source, module), the connection of the image into the first one and what it
    adds, and the readout."""

    neurons: list[Neurons]
    into: list[list[tuple[int, nn.Module]]]
    first: nn.Module
    offset: Tensor
    readout: nn.Module
    steps: int


def read(path: str) -> tuple[Network, Tensor, Tensor]:
    """The network of a file, its images, and the currents into the first population that the host makes of them, rounded as the chip has them."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "plan"}
        plan = json.loads(str(file["plan"]))
    neurons = [Neurons(tuple(p["shape"]), float(p["threshold"]), float(p["reset"])) for p in plan["populations"]]
    into: list[list[tuple[int, nn.Module]]] = [[] for _ in neurons]
    for connection in plan["connections"]:
        into[connection["target"]].append((connection["source"], module(connection, arrays)))
    network = Network(
        neurons, into, module(plan["first"], arrays), laid_out(arrays["offset"][None]), module(plan["readout"], arrays), plan["time_steps"]
    )
    return network, laid_out(arrays["images"]), laid_out(arrays["currents"])


def module(connection: dict[str, Any], arrays: dict[str, Tensor]) -> nn.Module:
    """A connection as the module of torch."""
    weight, bias = arrays[connection["weight"]], arrays.get(connection["bias"])
    made: nn.Module
    if connection["kind"] == "dense":
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    else:
        options = {
            "stride": connection["stride"],
            "padding": connection["padding"],
            "groups": connection["groups"],
            "bias": bias is not None,
        }
        kernel = tuple(weight.shape[2:])
        if connection["kind"] == "conv":
            made = nn.Conv2d(weight.shape[1] * connection["groups"], weight.shape[0], kernel, **options)
        else:
            options["output_padding"] = connection["output_padding"]
            made = nn.ConvTranspose2d(weight.shape[0], weight.shape[1] * connection["groups"], kernel, **options)
    made.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    made = made.eval().requires_grad_(False)
    flat = connection["kind"] == "dense"
    return nn.Sequential(nn.Flatten(), made) if flat else made.to(memory_format=torch.channels_last)


def laid_out(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values


def stepped(network: Network, fire: Callable[[int, Tensor], Tensor], reset: Callable[[int], None]) -> Run:
    """Time step after time step, population after population: a source that comes later in the order has the spikes of the step before."""
    last = len(network.neurons) - 1

    def run(images: Tensor, currents: Tensor | None = None, everything: bool = False) -> tuple[Tensor, list[Tensor | None]]:
        drive = network.first(images) + network.offset if currents is None else currents
        reset(len(images))
        spikes: list[Tensor | None] = [None] * len(network.neurons)
        counts: list[Tensor | None] = [None] * len(network.neurons)
        for _ in range(network.steps):
            for p, into in enumerate(network.into):
                current = drive if p == 0 else None
                for source, connection in into:
                    sent = spikes[source]
                    if sent is not None:
                        made = connection(sent)
                        current = made if current is None else made.add_(current)
                fired = fire(p, current)
                spikes[p] = fired
                if everything or p == last:
                    total = counts[p]
                    counts[p] = fired.clone() if total is None else total.add_(fired)
        return network.readout(counts[last]), counts

    return run


def spikingjelly(network: Network) -> Run:
    from spikingjelly.activation_based import neuron

    nodes = []
    for neurons in network.neurons:
        node = neuron.IFNode(v_threshold=neurons.reset, v_reset=None, step_mode="s").eval()
        node.set_reset_value("v", neurons.reset - neurons.threshold)
        nodes.append(node)

    def reset(_: int) -> None:
        for node in nodes:
            node.reset()

    return stepped(network, lambda p, current: nodes[p](current), reset)


def snntorch(network: Network) -> Run:
    """It fires above its threshold, not at it: half a unit more to begin with makes whole numbers do the same."""
    from snntorch import Leaky

    nodes = [Leaky(beta=1.0, threshold=neurons.reset, reset_mechanism="subtract").eval() for neurons in network.neurons]
    potentials: list[Tensor] = [torch.empty(0)] * len(nodes)

    def reset(samples: int) -> None:
        for p, (shape, threshold, amount) in enumerate(network.neurons):
            potentials[p] = laid_out(torch.full((samples, *shape), amount - threshold + 0.5))

    def fire(p: int, current: Tensor) -> Tensor:
        fired: Tensor
        fired, potentials[p] = nodes[p](current, potentials[p])
        return fired

    return stepped(network, fire, reset)


def eager(network: Network) -> Run:
    potentials: list[Tensor] = [torch.empty(0)] * len(network.neurons)

    def reset(samples: int) -> None:
        for p, neurons in enumerate(network.neurons):
            potentials[p] = laid_out(torch.zeros(samples, *neurons.shape))

    def fire(p: int, current: Tensor) -> Tensor:
        fired = (potentials[p].add_(current) >= network.neurons[p].threshold).to(current.dtype)
        potentials[p].sub_(fired, alpha=network.neurons[p].reset)
        return fired

    return stepped(network, fire, reset)


UNROLLED = 5
"""Time steps that are compiled together; 1 and 30 were slower."""


class Steps(nn.Module):
    """UNROLLED time steps as a function, for torch.compile."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.neurons = network.neurons
        self.sources = [[source for source, _ in into] for into in network.into]
        self.into = nn.ModuleList(nn.ModuleList(connection for _, connection in into) for into in network.into)

    def forward(
        self, drive: Tensor, potentials: list[Tensor], spikes: list[Tensor], total: Tensor
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        potentials, spikes = list(potentials), list(spikes)
        for _ in range(UNROLLED):
            for p, (_, threshold, reset) in enumerate(self.neurons):
                made = [connection(spikes[source]) for source, connection in zip(self.sources[p], self.into[p], strict=True)]
                potential = potentials[p] + sum(made, drive if p == 0 else torch.zeros(()))
                spikes[p] = (potential >= threshold).to(potential.dtype)
                potentials[p] = potential - reset * spikes[p]
            total = total + spikes[-1]
        return potentials, spikes, total


def compiled(network: Network) -> Run:
    """torch.compile at its most thorough, with the weights laid out for the processor; it counts the last population only."""
    import torch._inductor.config as inductor

    if network.steps % UNROLLED:
        raise ValueError(f"{network.steps} time steps are no multiple of the {UNROLLED} that are compiled together")
    inductor.freezing = True
    torch._dynamo.reset()
    steps = torch.compile(Steps(network).eval(), dynamic=False, mode="max-autotune")

    def run(images: Tensor, currents: Tensor | None = None, everything: bool = False) -> tuple[Tensor, list[Tensor | None]]:
        drive = network.first(images) + network.offset if currents is None else currents
        potentials = [laid_out(torch.zeros(len(images), *neurons.shape)) for neurons in network.neurons]
        spikes = [torch.zeros_like(potential) for potential in potentials]
        total = torch.zeros_like(spikes[-1])
        for _ in range(network.steps // UNROLLED):
            potentials, spikes, total = steps(drive, potentials, spikes, total)
        return network.readout(total), [*[None] * (len(spikes) - 1), total]

    return run


PEERS: dict[str, Callable[[Network], Run]] = {
    "SpikingJelly": spikingjelly,
    "snnTorch": snntorch,
    "plain torch": eager,
    "plain torch, compiled": compiled,
}


class Work:
    """What the requests are about: a network, its images, and the peers that have been built for it."""

    def __init__(self, path: str) -> None:
        self.network, self.images, self.currents = read(path)
        self.runs: dict[str, Run] = {}

    def run(self, peer: str) -> Run:
        if peer not in self.runs:
            self.runs[peer] = PEERS[peer](self.network)
        return self.runs[peer]

    def time(self, peer: str, batch: int, calls: int) -> dict[str, float]:
        """CPU seconds of `calls` runs of `batch` images, with the connection of the image, once a sample."""
        run, images = self.run(peer), self.images
        parts = [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]
        began = time.process_time()
        for call in range(calls):
            run(parts[call % len(parts)])
        return {"seconds": time.process_time() - began}

    def count(self, peer: str, samples: int, to: str) -> dict[str, int]:
        """Spike counts of the first samples, on the host's own currents, into the file `to`, by the place of their population."""
        _, counts = self.run(peer)(self.images[:samples], self.currents[:samples], True)
        np.savez(to, **{str(place): total.contiguous().numpy() for place, total in enumerate(counts) if total is not None})
        return {"samples": samples}


class Peers:
    """This file as a process in the environment in `folder`, as the benchmark sees it; `missing` says why there is none."""

    def __init__(self, folder: Path) -> None:
        self.names: list[str] = []
        self.versions: dict[str, str] = {}
        self.missing: str | None = f"not installed: make peers ({folder} is not there)"
        self._process: subprocess.Popen[str] | None = None
        python = folder / "bin" / "python"
        if not python.exists():
            return
        command = [str(python), "-W", "ignore", str(Path(__file__).resolve())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        hello = self._answer()
        self.missing, self.names, self.versions = None, hello["peers"], hello["versions"]

    def ask(self, what: str, **request: Any) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        print(json.dumps({"do": what, "with": request}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(
                f"the process of the peers ended with {self._process.wait()}: run `make peers` again, or try benchmarks/peers.py in its environment"
            )
        found: dict[str, Any] = json.loads(line)
        return found

    def seconds(self, peer: str, batch: int, calls: int) -> float:
        """CPU seconds of so many runs; RuntimeError where the peer cannot run."""
        answer = self.ask("time", peer=peer, batch=batch, calls=calls)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return float(answer["seconds"])

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Answer requests until stdin ends. What the libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    work: Work | None = None
    print(
        json.dumps({"peers": list(PEERS), "versions": {name: installed(name) for name in ("torch", "spikingjelly", "snntorch")}}),
        file=answers,
        flush=True,
    )
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            with torch.inference_mode():
                if asked["do"] == "load":
                    work, made = Work(**asked["with"]), {}
                else:
                    assert work is not None
                    made = getattr(work, asked["do"])(**asked["with"])
        except Exception as error:  # any failure of a library is the answer of its row
            made = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(made), file=answers, flush=True)


if __name__ == "__main__":
    main()
