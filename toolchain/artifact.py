"""The artefact NAME.fsnn: one safetensors file that holds a compiled graph, its folded float graph, and golden vectors. No pickle, ever.

Layout: tensors named `graph/KEY` (integers), `float/KEY` (float64, unless left out), `golden/KEY`; one metadata entry `fsnn` with the rest as canonical
JSON (sorted keys), so that the same compilation gives the same bytes. A digest over everything tells an edited file from a good one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Union

import msgspec
import numpy as np

from toolchain import ir
from toolchain.errors import ArtifactError, GraphError
from toolchain.files import replace_file, require_plain, require_short_numbers
from toolchain.ir import Array, Graph

__all__ = ["Artifact", "Golden", "read", "write"]

FORMAT_VERSION = 2
LARGEST_FILE = 4 * 2**30
"""Bytes; a larger file is refused before it is read."""


class Golden(ir.Part, frozen=True):
    """Seeded inputs and what the reference made of them: `toolchain verify --replay` compares any machine with it.

    Tensors: `inputs` (samples, *input shape) in [0, 1]; `error` for the feedback phase; `PHASE.counts.POPULATION`,
    `PHASE.potentials.POPULATION` (the final ones) and `PHASE.saturations.POPULATION`.
    """

    samples: int
    seed: int
    phases: tuple[str, ...]
    time_steps: dict[str, int] = {}
    """How many time steps of each phase were run: the first ones of a large net, else (and without an entry) all."""


class Artifact(msgspec.Struct, frozen=True):
    """A compiled network. `graph` is what the chip runs; `float_graph` is folded and adjoint but neither retimed nor rounded (None with --no-float)."""

    graph: Graph
    float_graph: Union[Graph, None]
    target: str
    pipeline: str
    toolchain: str
    golden: Golden
    golden_tensors: dict[str, Array]


class _GraphHeader(ir.Part, frozen=True):
    """A graph without its tensors."""

    populations: tuple[ir.Population, ...]
    phases: tuple[ir.Phase, ...]
    units: ir.Units
    provenance: ir.Provenance
    placement: Union[ir.Placement, None] = None


class _Header(ir.Part, frozen=True):
    version: int
    toolchain: str
    target: str
    pipeline: str
    graph: _GraphHeader
    float_graph: Union[_GraphHeader, None]
    golden: Golden
    digest: str = ""


def write(artifact: Artifact, path: str | os.PathLike[str]) -> None:
    """Write `artifact` to `path`: to a temporary file first, then renamed, so no half-written artefact ever has the name."""
    from safetensors.numpy import save

    header, tensors = taken_apart(artifact)
    replace_file(Path(path), save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, {"fsnn": header}))


def taken_apart(artifact: Artifact) -> tuple[str, dict[str, Array]]:
    """The signed header as canonical JSON, and the tensors by their names in the file: all that a file of any format needs to hold."""
    tensors = {f"graph/{name}": tensor for name, tensor in artifact.graph.tensors.items()}
    if artifact.float_graph is not None:
        tensors |= {f"float/{name}": tensor for name, tensor in artifact.float_graph.tensors.items()}
    tensors |= {f"golden/{name}": tensor for name, tensor in artifact.golden_tensors.items()}
    header = _Header(
        version=FORMAT_VERSION,
        toolchain=artifact.toolchain,
        target=artifact.target,
        pipeline=artifact.pipeline,
        graph=_header(artifact.graph),
        float_graph=None if artifact.float_graph is None else _header(artifact.float_graph),
        golden=artifact.golden,
    )
    header = msgspec.json.decode(_json(header), type=_Header)  # as it will be read: a 1 where a float belongs becomes 1.0
    signed = msgspec.structs.replace(header, digest=_digest(header, tensors))
    return _json(signed).decode(), tensors


def read(path: str | os.PathLike[str]) -> Artifact:
    """Read and check an artefact; ArtifactError says what is wrong with the file and where."""
    file = Path(path)
    return put_together(file, *_raw(file))


def put_together(file: Path, raw: str, tensors: Mapping[str, Array]) -> Artifact:
    """The artefact of which `file` holds the header `raw` and `tensors`, checked whole; ArtifactError as of `read`."""
    version = _version(file, raw)
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"'{file}' has artefact format {version}, this toolchain reads {FORMAT_VERSION}: compile it again from its source"
        )
    try:
        header = msgspec.json.decode(raw, type=_Header)
    except (msgspec.ValidationError, OverflowError) as error:
        raise ArtifactError(f"'{file}' has a header this toolchain does not know ({error}): compile it again") from None
    if _digest(msgspec.structs.replace(header, digest=""), tensors) != header.digest:
        raise ArtifactError(f"'{file}' was changed after it was compiled (its digest does not match): compile it again, or fetch it again")
    graph = _graph(file, header.graph, "graph", tensors)
    float_graph = None if header.float_graph is None else _graph(file, header.float_graph, "float", tensors)
    golden = {name.removeprefix("golden/"): tensor for name, tensor in tensors.items() if name.startswith("golden/")}
    _require_golden(file, graph, header.golden, golden)
    return Artifact(graph, float_graph, header.target, header.pipeline, header.toolchain, header.golden, golden)


def _require_golden(file: Path, graph: Graph, golden: Golden, tensors: Mapping[str, Array]) -> None:
    """Golden vectors must be of phases the graph has, with inputs for each and one row a sample."""
    needed = {"forward": "inputs", "feedback": "error"}
    if golden.samples < 1:
        raise ArtifactError(f"'{file}' has no golden samples: compile it again")
    for phase in golden.phases:
        if phase not in needed or not graph.has_phase(phase):
            raise ArtifactError(f"'{file}' has golden vectors of phase '{phase}', which its graph lacks: compile it again")
        if not 1 <= golden.time_steps.get(phase, 1) <= graph.phase(phase).time_steps:
            raise ArtifactError(
                f"'{file}' has golden vectors of {golden.time_steps[phase]} time steps for the {graph.phase(phase).time_steps} of its {phase} phase: compile it again"
            )
        if needed[phase] not in tensors:
            raise ArtifactError(f"'{file}' lacks tensor 'golden/{needed[phase]}': compile it again")
    for name, tensor in tensors.items():
        if len(tensor) != golden.samples:
            raise ArtifactError(
                f"'{file}' has {len(tensor)} rows in tensor 'golden/{name}' for {golden.samples} golden samples: compile it again"
            )


def _raw(file: Path) -> tuple[str, dict[str, Array]]:
    """The metadata entry and all tensors of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    require_plain(file)
    try:
        size = file.stat().st_size
        if size > LARGEST_FILE:
            raise ArtifactError(f"'{file}' is {size:,} bytes, above the limit of {LARGEST_FILE:,}: this is no artefact of the toolchain")
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: ir.frozen(opened.get_tensor(name)) for name in sorted(opened.keys())}
    except FileNotFoundError:
        raise ArtifactError(f"there is no file '{file}': check the path") from None
    except OSError as error:
        raise ArtifactError(f"'{file}' cannot be read ({error.strerror or error}): check the path") from None
    # a type of number that this NumPy does not know is an AttributeError of safetensors
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"'{file}' is no readable artefact, perhaps cut short ({error}): compile it again") from None
    if "fsnn" not in metadata:
        raise ArtifactError(
            f"'{file}' is a safetensors file but no artefact (it has no 'fsnn' entry): give a file that `toolchain compile` wrote"
        )
    return metadata["fsnn"], tensors


def _version(file: Path, raw: str) -> object:
    try:
        header: Any = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ArtifactError(f"'{file}' has a damaged header ({error}): compile it again") from None
    require_short_numbers(header, file)
    return header.get("version") if isinstance(header, dict) else None


def _header(graph: Graph) -> _GraphHeader:
    return _GraphHeader(graph.populations, graph.phases, graph.units, graph.provenance, graph.placement)


def _graph(file: Path, header: _GraphHeader, prefix: str, tensors: Mapping[str, Array]) -> Graph:
    own = {name.removeprefix(f"{prefix}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")}
    needed = {name for phase in header.phases for name in ir.tensor_names(phase)}
    _same_names(file, prefix, needed, own)
    graph = Graph(header.populations, header.phases, own, header.units, header.provenance, header.placement)
    try:
        ir.verify(graph)
    except GraphError as error:
        raise ArtifactError(f"'{file}' holds an invalid {'float graph' if prefix == 'float' else 'graph'}: {error}") from None
    return graph


def _same_names(file: Path, prefix: str, needed: Iterable[str], found: Iterable[str]) -> None:
    missing, extra = sorted(set(needed) - set(found)), sorted(set(found) - set(needed))
    if missing:
        raise ArtifactError(f"'{file}' lacks tensor '{prefix}/{missing[0]}', which its graph reads: compile it again")
    if extra:
        raise ArtifactError(f"'{file}' has tensor '{prefix}/{extra[0]}', which its graph does not read: compile it again")


def _json(header: _Header) -> bytes:
    return msgspec.json.encode(header, order="deterministic")


def _digest(header: _Header, tensors: Mapping[str, Array]) -> str:
    """sha256 over the header without its digest and every tensor's name, type, shape and bytes."""
    sum_ = hashlib.sha256(_json(header))
    for name in sorted(tensors):
        tensor = tensors[name]
        sum_.update(f"{name}:{tensor.dtype.str}:{tensor.shape}".encode())
        sum_.update(np.ascontiguousarray(tensor).tobytes())
    return sum_.hexdigest()
