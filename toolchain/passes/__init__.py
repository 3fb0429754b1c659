"""Passes over the graph: frozen dataclasses called as Graph -> Graph, pure, valid in and valid out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

import msgspec

from toolchain.errors import GraphError, UsageError, unknown
from toolchain.ir import Graph, verify
from toolchain.passes.adjoint import Adjoint
from toolchain.passes.expand import ExpandCouples
from toolchain.passes.fold import Fold
from toolchain.passes.inject import Inject, injected_like
from toolchain.passes.partition import Partition
from toolchain.passes.quantize import Quantize
from toolchain.passes.retime import Retime

Watch = Callable[[str, Graph, Graph], None]


class Pass(Protocol):
    """One rewrite of the graph; its dataclass fields are its options."""

    @property
    def name(self) -> str: ...

    def __call__(self, graph: Graph) -> Graph: ...


def _unwatched(name: str, before: Graph, after: Graph) -> None:
    pass


@dataclass(frozen=True)
class Pipeline:
    """Passes in order, itself a pass. It verifies after each and calls `watch(name, before, after)`."""

    passes: tuple[Pass, ...]
    watch: Watch = _unwatched
    name: str = "pipeline"

    def __call__(self, graph: Graph) -> Graph:
        verify(graph)
        for rewrite in self.passes:
            before = graph
            try:
                graph = _recorded(rewrite(before), rewrite.name)
                verify(graph)
            except GraphError as error:
                raise GraphError(f"pass '{rewrite.name}' (after {', '.join(before.provenance.passes) or 'lowering'}): {error}") from error
            self.watch(rewrite.name, before, graph)
        return graph

    def with_options(self, **options: dict[str, Any]) -> Pipeline:
        """A copy with fields of passes replaced: `with_options(quantize={"weight_bits": 4})`; unknown names list the known ones."""
        known = {p.name for p in self.passes}
        for name in options:
            if name not in known:
                raise unknown("pass", name, known)
        return replace(self, passes=tuple(_replaced(p, options.get(p.name, {})) for p in self.passes))

    def until(self, name: str) -> Pipeline:
        """The passes up to and including `name`."""
        names = [p.name for p in self.passes]
        if name not in names:
            raise unknown("pass", name, names)
        return replace(self, passes=self.passes[: names.index(name) + 1])

    def __str__(self) -> str:
        return " -> ".join(p.name for p in self.passes)


def _recorded(graph: Graph, name: str) -> Graph:
    provenance = msgspec.structs.replace(graph.provenance, passes=(*graph.provenance.passes, name))
    return msgspec.structs.replace(graph, provenance=provenance)


def _replaced(rewrite: Pass, options: dict[str, Any]) -> Pass:
    fields = {
        name: kind
        for name, kind in get_type_hints(type(rewrite)).items()
        if name in getattr(rewrite, "__dataclass_fields__", {}) and name != "name"
    }
    for option, value in options.items():
        if option not in fields:
            raise UsageError(f"pass '{rewrite.name}' has no option '{option}': it has {', '.join(fields) or 'none'}")
        if get_origin(fields[option]) is Literal and value not in get_args(fields[option]):
            raise unknown(f"{rewrite.name} {option}", str(value), get_args(fields[option]))
        try:
            msgspec.convert(value, fields[option], strict=True)
        except msgspec.ValidationError as error:
            raise UsageError(
                f"option '{option}' of pass '{rewrite.name}' cannot be {value!r}: {str(error)[0].lower()}{str(error)[1:]}"
            ) from None
    changed: Pass = replace(rewrite, **options)  # type: ignore[type-var]  # a protocol cannot say that it is a dataclass
    return changed


FLOAT_PIPELINE = Pipeline((Fold(), Adjoint(), Inject(), Retime()))
"""To a float graph in hardware time: what floating-point Lava processes run."""

LOIHI_PIPELINE = Pipeline((Fold(), Adjoint(), Inject(), Retime(), Quantize(), Partition()))
"""To an integer graph in hardware time on cores: what the chip, its simulators and the reference run."""

__all__ = [
    "FLOAT_PIPELINE",
    "LOIHI_PIPELINE",
    "Adjoint",
    "ExpandCouples",
    "Fold",
    "Inject",
    "Partition",
    "Pass",
    "Pipeline",
    "Quantize",
    "Retime",
    "Watch",
    "injected_like",
]
