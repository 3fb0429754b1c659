"""Networks as NIR files (Pedersen et al., Nature Communications 2024), and back.

A file that `export` writes is the exact network: its forward phase in NIR's own nodes (see `nir_nodes`), which hold the weights, and in the metadata what NIR has no words for: reset by
subtraction, signed spikes and the feedback phase, units, integers, steps. `import_` gives back the same artefact or the same checkpoint, to the last bit, and `nir_torch` runs the nodes in nirtorch.
With `approximate` the file is for readers that know NIR's nodes only (`nir_stock`). Files of others become a network of ours where it can say what they do (`nir_foreign`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Union

import msgspec
import numpy as np

import toolchain
from toolchain import artifact, checkpoint, config, models
from toolchain.checkpoint import About
from toolchain.compiler import lowered
from toolchain.config import Config, Training
from toolchain.errors import ArtifactError, ToolchainError, UsageError
from toolchain.exchange import nir_files, nir_nodes
from toolchain.exchange.nir_nodes import DT, KEY, Sheet
from toolchain.exchange.nir_places import Place, taken
from toolchain.files import LOCK, held, ready_folder, replace_file
from toolchain.ir import Array, Graph
from toolchain.source import Model, Source
from toolchain.train import CONFIG
from toolchain.versions import installed, versions

if TYPE_CHECKING:
    import nir
    import torch

    from toolchain.layers import FeedbackSNN

FORMAT = 1
"""Version of what our entry in a file's metadata says, and of the nodes that are drawn: on import a file's nodes are held to those."""

SAME = 1e-5
"""Nodes of a float network are folded anew on import: another machine adds in another order, so values differ by less than that share of the largest."""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Our entry in a file's metadata.

    kind      artefact: `header` is that of a .fsnn file (see `toolchain.artifact`), signed with its digest. network: `header` is what a checkpoint says of itself, `sha256`
              that of its weights. approximation: the file is for readers of NIR's own nodes, and there is nothing to restore
    places    where nodes hold tensors, by name; all others are arrays of the metadata under their own names
    scalars   of these, those that have no axis, which HDF5 does not pack
    lost      what a reader that does not look here will not see
    """

    format: int
    kind: str
    toolchain: str
    model: str
    time_steps: int
    dt: float
    lost: tuple[str, ...] = ()
    header: str = ""
    sha256: str = ""
    places: dict[str, Place] = {}
    scalars: tuple[str, ...] = ()


class Outcome(Protocol):
    """What `export` returns, exact or approximate."""

    def to_json(self) -> dict[str, Any]: ...

    def to_text(self) -> str: ...


@dataclass(frozen=True)
class Written:
    """A NIR file of the exact network. `lost` is what readers of NIR's own nodes will not see; `import_` and `nir_torch` lose nothing."""

    model: str
    output: str
    bytes: int
    kind: str
    nodes: int
    edges: int
    time_steps: int
    lost: tuple[str, ...]
    versions: dict[str, str]
    format: str = "nir"

    def to_json(self) -> dict[str, Any]:
        return {"format": self.format, **{name: getattr(self, name) for name in self.__dataclass_fields__ if name != "format"}}

    def to_text(self) -> str:
        return "\n".join(
            [
                f"{self.model} as nir, the exact {self.kind}: {self.nodes} nodes, {self.edges} edges, T {self.time_steps}",
                "a reader that knows only NIR's own nodes will not see:",
                *(f"- {sentence}" for sentence in self.lost),
                f"wrote {self.output} ({self.bytes:,} bytes); toolchain import gives back the same {self.kind}, toolchain.exchange.nir_torch runs it in nirtorch",
            ]
        )


@dataclass(frozen=True)
class Imported:
    """What a NIR file held, and where it was written. `kind` is artefact, network (both as they were exported) or foreign; `warnings` say what may differ from where it came from."""

    path: str
    model: str
    kind: str
    output: str | None
    time_steps: int
    neurons: int
    parameters: int
    warnings: tuple[str, ...]
    versions: dict[str, str]
    format: str = "nir"

    def to_json(self) -> dict[str, Any]:
        return {"format": self.format, **{name: getattr(self, name) for name in self.__dataclass_fields__ if name != "format"}}

    def to_text(self) -> str:
        what = {"artefact": "the artefact", "network": "the network", "foreign": "a network of another library,"}[self.kind]
        lines = [f"{self.path} holds {what} '{self.model}': {self.neurons:,} neurons, {self.parameters:,} parameters, T {self.time_steps}"]
        lines += ["warnings:", *(f"- {sentence}" for sentence in self.warnings)] if self.warnings else []
        lines.append("nothing was written: give -o" if self.output is None else f"wrote {self.output}")
        return "\n".join(lines)


def recorded() -> dict[str, str]:
    """The versions that a record names."""
    return versions() | {name: installed(name) or "not installed" for name in ("nir", "nirtorch", "h5py")}


def export(
    model: Model,
    source: Source,
    path: Path,
    *,
    approximate: bool,
    dataset: str,
    samples: int,
    data_dir: str | Path | None,
) -> Outcome:
    """Write `source`, which `model` names, to `path`; with `approximate` for readers of NIR's own nodes, measured on `samples` samples of `dataset`."""
    nir_files.require()
    if approximate:
        from toolchain.exchange import nir_stock

        return nir_stock.export(model, source, path, dataset=dataset, samples=samples, data_dir=data_dir)
    ready_folder(path.parent)
    kind = "network" if source.artifact is None else "artefact"
    graph = lowered(source) if source.artifact is None else source.artifact.graph
    sheet = nir_nodes.draw(graph)
    lost = (*_lost(graph), *sheet.lost)
    entry = Entry(FORMAT, kind, toolchain.__version__, source.name, graph.phase("forward").time_steps, DT, lost)
    made = _artefact(source, sheet, entry) if source.artifact is not None else _network(model, source, sheet, entry)
    _require_same(made, path, source)
    return Written(
        model=source.name,
        output=str(path),
        bytes=nir_files.write(path, made),
        kind=kind,
        nodes=len(made.nodes),
        edges=len(made.edges),
        time_steps=entry.time_steps,
        lost=lost,
        versions=recorded(),
    )


def _lost(graph: Graph) -> list[str]:
    """What NIR's own nodes do not say of any network of ours."""
    forward = graph.phase("forward")
    found = ["reset by subtraction: NIR's neurons are set to v_reset and forget by how much they passed the threshold"]
    if graph.has_phase("feedback"):
        found.append("the feedback phase: NIR has neither signed spikes nor a second phase")
    if graph.integer:
        found.append("integers: potentials of 24 bits that end at their limits, leaks rounded towards zero")
    if any(dynamics.leak != 1 for dynamics in forward.dynamics.values()):
        found.append(f"the leak as a factor: tau is exact for Euler steps of dt = {DT:g} s only")
    if any(nir_nodes.steps_late(forward, s) for s in forward.synapses):
        found.append("the order within a step: populations see the spikes of earlier ones in the same step, and only feedback is delayed")
    found.append(f"the number of time steps ({forward.time_steps}) and what the logits are divided by")
    return found


def _artefact(source: Source, sheet: Sheet, entry: Entry) -> nir.NIRGraph:
    """The nodes with all else that a .fsnn file holds."""
    assert source.artifact is not None  # the caller asked
    header, tensors = artifact.taken_apart(source.artifact)
    return whole(sheet, msgspec.structs.replace(entry, header=header), {name: f"graph/{name}" for name in sheet.places}, tensors)


def _network(model: Model, source: Source, sheet: Sheet, entry: Entry) -> nir.NIRGraph:
    """The nodes with all else that a checkpoint holds."""
    from toolchain.lower import fingerprint

    assert source.module is not None  # the caller asked
    about = msgspec.json.encode(_about(model, source.module)).decode()
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in source.module.state_dict().items()}
    signed = msgspec.structs.replace(entry, header=about, sha256=fingerprint(source.module))
    return whole(sheet, signed, {name: name for name in sheet.places}, tensors)


def _about(model: Model, module: FeedbackSNN) -> About:
    """What the checkpoint of `model` says of itself; of a module that has none, its network, and a data set that says whether its data are events."""
    from toolchain.layers import describe
    from toolchain.lower import takes_events

    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        if str(model) in models.names():
            path = models.get(str(model)).weights
        return checkpoint.read(path / checkpoint.NAME if path.is_dir() else path).about
    train = Training(dataset="nmnist" if takes_events(module) else "mnist")
    return About(checkpoint.FORMAT, Config(describe(module), train), 0, None)


def whole(sheet: Sheet, entry: Entry, names: dict[str, str], tensors: dict[str, Array]) -> nir.NIRGraph:
    """The graph with its metadata: `tensors` that nodes hold exactly stay there, where `names` says under which name they are wanted, all others go into the metadata."""
    import nir

    places = {}
    for tensor, name in names.items():
        wanted = tensors.get(name)
        if wanted is not None and (found := _found(sheet.places[tensor], sheet, wanted)) is not None:
            places[name] = found
    kept = {name: tensor for name, tensor in tensors.items() if name not in places}
    scalars = tuple(sorted(name for name, tensor in kept.items() if tensor.ndim == 0))
    entry = msgspec.structs.replace(entry, places=places, scalars=scalars)
    metadata: dict[str, Any] = {KEY: msgspec.json.encode(entry, order="deterministic").decode()}
    metadata |= {"tensors": _nested(kept)} if kept else {}
    try:
        return nir.NIRGraph(sheet.nodes, sheet.edges, metadata)
    except (ValueError, AssertionError, TypeError) as error:
        raise ToolchainError(f"nir does not take the nodes of '{entry.model}' ({error}): export it in another format") from None


def _found(place: Place, sheet: Sheet, wanted: Array) -> Place | None:
    """The place at which a node holds `wanted` to the last bit, if it does."""
    field = _field(sheet.nodes, place)
    own = msgspec.structs.replace(place, dtype=wanted.dtype.str, shape=wanted.shape)
    for candidate in (own, msgspec.structs.replace(own, form="same")):
        try:
            found = taken(candidate, field)
        except (ValueError, IndexError):  # another form may fit
            continue
        if found.tobytes() == np.ascontiguousarray(wanted).tobytes():
            return candidate
    return None


def _field(nodes: Any, place: Place) -> Array:
    node = nodes[place.node]
    return np.asarray(
        node.metadata[place.field] if place.field.startswith("bias") and place.field != "bias" else getattr(node, place.field)
    )


def _tensors(path: Path, graph: nir.NIRGraph, entry: Entry) -> dict[str, Array]:
    """All tensors of a file of ours by name; ArtifactError where a node or its field is missing or of another size."""
    kept = _flat(graph.metadata.get("tensors", {}))
    for name, tensor in kept.items():
        if tensor.dtype.kind not in "biuf":
            raise ArtifactError(f"'{path}' holds values of type {tensor.dtype} as tensor '{name}': export it again")
    found = {name: tensor.reshape(()) if name in entry.scalars and tensor.size == 1 else tensor for name, tensor in kept.items()}
    for name, place in entry.places.items():
        try:
            found[name] = taken(place, _field(graph.nodes, place))
        except (KeyError, AttributeError, ValueError, IndexError, TypeError, ArithmeticError) as error:
            said = " ".join(str(error).split())[:200]
            raise ArtifactError(
                f"'{path}' does not hold tensor '{name}' in node '{place.node}' as it says ({said}): export it again"
            ) from None
    return found


def _nested(tensors: dict[str, Array]) -> dict[str, Any]:
    """Arrays by the parts of their names, a group for each, as HDF5 has them; those without an axis get one, since HDF5 packs none without."""
    groups: dict[str, Any] = {}
    for name, tensor in sorted(tensors.items()):
        *path, last = name.split("/")
        group = groups
        for part in path:
            group = group.setdefault(part, {})
        group[last] = np.atleast_1d(np.ascontiguousarray(tensor))
    return groups


def _flat(group: Any, prefix: str = "") -> dict[str, Array]:
    """Arrays by their path in a group of groups."""
    found: dict[str, Array] = {}
    for name, value in group.items() if isinstance(group, dict) else ():
        found |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": np.asarray(value)}
    return found


def _require_same(made: nir.NIRGraph, path: Path, source: Source) -> None:
    """What will be read is what was given: digests and the nodes drawn anew say so."""
    entry = entry_of(made, path)
    assert entry is not None  # it was made here
    whole_network(path, made, entry)


def entry_of(graph: nir.NIRGraph, path: Path) -> Entry | None:
    """Our entry in a graph's metadata, None in files of others; ArtifactError where it is damaged or of another version."""
    if KEY not in graph.metadata:
        return None
    raw = graph.metadata[KEY]
    try:
        found = msgspec.json.decode(raw if isinstance(raw, (str, bytes)) else b"", type=dict[str, Any])
        if found.get("format") != FORMAT:
            raise ArtifactError(
                f"'{path}' has an entry 'fsnn' of format {found.get('format')}, this toolchain reads {FORMAT}: export it again"
            )
        return msgspec.convert(found, Entry, strict=True)
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"'{path}' has an entry 'fsnn' that this toolchain does not know ({error}): export it again") from None


def _restored(
    path: Path, graph: nir.NIRGraph, entry: Entry
) -> Union[artifact.Artifact, tuple[About, dict[str, torch.Tensor], FeedbackSNN]]:
    """The artefact, or the checkpoint and its module, that a file of ours was made of; ArtifactError where one bit differs."""
    if entry.kind == "artefact":
        return artifact.put_together(path, entry.header, dict(sorted(_tensors(path, graph, entry).items())))
    if entry.kind != "network":
        raise ArtifactError(
            f"'{path}' is the approximation that export --approximate wrote, and does not hold the network itself: export it without --approximate"
        )
    import torch

    from toolchain.lower import fingerprint

    try:
        about = msgspec.json.decode(entry.header, type=About)
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"'{path}' describes its network in a way this version does not read ({error}): export it again") from None
    tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in _tensors(path, graph, entry).items()}
    module = checkpoint.module(checkpoint.Checkpoint(tensors, about), path)
    if fingerprint(module) != entry.sha256:
        raise ArtifactError(f"'{path}' was changed after it was exported (the sha256 of its weights does not match): export it again")
    return about, tensors, module


def whole_network(
    path: Path, graph: nir.NIRGraph, entry: Entry
) -> Union[artifact.Artifact, tuple[About, dict[str, torch.Tensor], FeedbackSNN]]:
    """What a file of ours was made of (see `_restored`), whose nodes, which nirtorch and other readers run, say the same; ArtifactError names the first that does not."""
    restored = _restored(path, graph, entry)
    compiled = isinstance(restored, artifact.Artifact)
    drawn = restored.graph if isinstance(restored, artifact.Artifact) else lowered(Source(entry.model, restored[2], None))
    sheet = nir_nodes.draw(drawn)
    steps = drawn.phase("forward").time_steps
    if (entry.time_steps, entry.dt) != (steps, DT):
        raise ArtifactError(
            f"'{path}' was changed after it was exported: it says T {entry.time_steps} and dt {entry.dt:g} s of a network with T {steps} and dt {DT:g} s; export it again"
        )
    for name in sorted({*sheet.nodes, *graph.nodes}):
        there, wanted = graph.nodes.get(name), sheet.nodes.get(name)
        if there is None or wanted is None or not _alike(there.to_dict(), wanted.to_dict(), 0.0 if compiled else SAME):
            raise ArtifactError(f"'{path}' was changed after it was exported: node '{name}' is not that of its network; export it again")
    if {(str(a), str(b)) for a, b in graph.edges} != set(sheet.edges):
        raise ArtifactError(f"'{path}' was changed after it was exported: its edges are not those of its network; export it again")
    return restored


def _alike(there: Any, wanted: Any, share: float) -> bool:
    """Whether two values of nodes are the same, numbers up to a `share` of the largest; our entries in their metadata are compared by what they say."""
    if isinstance(wanted, dict):
        return isinstance(there, dict) and there.keys() == wanted.keys() and all(_alike(there[key], wanted[key], share) for key in wanted)
    if isinstance(wanted, (str, bytes)):
        if there == wanted or not (isinstance(there, str) and share and there.startswith("{")):
            return bool(there == wanted)
        try:
            return _alike(msgspec.json.decode(there), msgspec.json.decode(wanted), share)
        except (msgspec.DecodeError, RecursionError):
            return False
    a, b = np.asarray(there), np.asarray(wanted)
    if a.shape != b.shape or a.dtype.kind not in "biuf" or b.dtype.kind not in "biuf":
        return a.shape == b.shape and a.dtype.kind == b.dtype.kind and bool((a == b).all())
    a, b = a.astype(np.float64), b.astype(np.float64)
    return bool(np.array_equal(a, b) or (share and b.size and (np.abs(a - b) <= share * np.abs(b).max()).all()))


def import_(
    path: Path,
    output: Path | None,
    *,
    time_steps: int | None = None,
    reset: str | None = None,
    dt: float | None = None,
) -> Imported:
    """Read the network of `path` and write it to `output`: a file of ours as what it was made of, FILE.fsnn or a run folder, one of others as a run folder.

    `time_steps`, `reset` and `dt` are for files of others: see `nir_foreign.network`.
    """
    nir_files.require()
    graph = nir_files.read(path)
    entry = entry_of(graph, path)
    if entry is None:
        from toolchain.exchange import nir_foreign

        return nir_foreign.import_(path, graph, output, time_steps=time_steps, reset=reset, dt=dt)
    for flag, value in (("--time-steps", time_steps), ("--reset", reset), ("--dt", dt)):
        if value is not None:
            raise UsageError(f"{flag} is for files of others, and '{path}' says all of the network itself: leave it out")
    restored = whole_network(path, graph, entry)
    if isinstance(restored, artifact.Artifact):
        if output is not None:
            if output.suffix != ".fsnn":
                raise UsageError(f"'{path}' holds a compiled artefact: give -o FILE.fsnn, not '{output}'")
            artifact.write(restored, output)
        neurons = sum(prod(p.shape) for p in restored.graph.of_kind("couple"))
        parameters = sum(tensor.size for tensor in restored.graph.tensors.values())
        return _imported(path, entry, output, neurons, parameters)
    about, tensors, module = restored
    if output is not None:
        write_run(output, about, tensors)
    from toolchain.layers import counts

    counted = counts(module)
    return _imported(path, entry, output, sum(counted.neurons), counted.parameters)


def _imported(path: Path, entry: Entry, output: Path | None, neurons: int, parameters: int) -> Imported:
    written = None if output is None else str(output)
    return Imported(str(path), entry.model, entry.kind, written, entry.time_steps, neurons, parameters, (), recorded())


def write_run(folder: Path, about: About, tensors: dict[str, torch.Tensor]) -> None:
    """A run folder with one checkpoint, as `toolchain train` leaves it; UsageError where there is something already."""
    require_new(folder)
    with held(folder):
        require_new(folder)  # again: another import may have been here before the folder was ours
        checkpoint.write(folder / checkpoint.NAME, tensors, about)
        replace_file(folder / CONFIG, config.text(about.config).encode())


def require_new(folder: Path) -> None:
    """UsageError where `folder` cannot become a run folder; nothing is written."""
    if folder.suffix == ".fsnn":
        raise UsageError(f"the network is not compiled: give -o a run folder, and compile that to '{folder}'")
    if folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        raise UsageError(f"'{folder}' exists and is not empty: choose another run folder")
