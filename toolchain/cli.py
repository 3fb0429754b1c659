"""The command line: a thin shell over the functions of `toolchain`. stdout is the result, stderr is for people.

Nothing heavy is imported before a verb runs, so `toolchain --help` answers at once.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import signal
import sys
import traceback
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, NoReturn, Protocol

import typer

import toolchain
from toolchain import endings, processes, shortage
from toolchain.endings import INTERRUPTED, TERMINATED
from toolchain.errors import ToleranceError, ToolchainError, UsageError
from toolchain.progress import say, visible

app = typer.Typer(
    name="toolchain",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Train feedback spiking neural networks in PyTorch, compile them to Loihi-style process graphs, and compare the chip with the GPU.",
    epilog="\b\nExamples:\n  toolchain doctor\n  toolchain compare mnist-fc --targets torch,sim,lava-sim --report out/report\n  toolchain deploy --help",
)


class Outcome(Protocol):
    """What every function behind a verb returns."""

    def to_json(self) -> dict[str, Any]: ...

    def to_text(self) -> str: ...


def _path(text: str) -> Path:
    """The path of a flag; an empty one would mean the working directory."""
    if not text:
        raise UsageError("a path is empty: give a name, or '.' for the working directory")
    return Path(text)


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A name from `toolchain models`, a run folder, a checkpoint, or a .fsnn file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Dataset = Annotated[str, typer.Option(metavar="D", help="digits, mnist-1k, mnist or fashion-mnist.")]
Samples = Annotated[int | None, typer.Option(metavar="N", help="How many samples, from the first; all by default.")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where torch computes.")]
Fallback = Annotated[str | None, typer.Option(metavar="TARGET", help="Run there where a target's dependency is missing, and say so.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what the same command had done when it failed or was ended.")]
DataDir = Annotated[
    Path | None, typer.Option(parser=_path, metavar="DIR", help="Where data sets are; else $TOOLCHAIN_DATA, else the cache.")
]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="One setting; may be given again.")]


def _examples(*lines: str) -> str:
    """An epilog that keeps its lines (backspace is click's mark for that)."""
    return "\n".join(
        [
            "\b",
            "Examples:",
            *(f"  toolchain {line}" for line in lines),
            "",
            "With --debug, before or after the verb, errors show their traceback.",
        ]
    )


def _print(outcome: Outcome, json: bool = False) -> None:
    if not json:
        print(visible(outcome.to_text()))
        return
    import msgspec

    try:
        text = msgspec.json.format(msgspec.json.encode(outcome.to_json()), indent=2).decode()
        if not text.isascii():
            text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:  # what the stream cannot carry, or a file's name that is no text, has an escape in JSON
        text = _ascii(outcome.to_json())
    print(visible(text))


def _ascii(value: object) -> str:
    """JSON of ASCII only."""
    import json

    import msgspec

    def whole(part: Any) -> Any:
        """What is no number is null, as in all our JSON."""
        if isinstance(part, dict):
            return {name: whole(inner) for name, inner in part.items()}
        if isinstance(part, list):
            return [whole(inner) for inner in part]
        return None if isinstance(part, float) and not isfinite(part) else part

    return json.dumps(whole(msgspec.to_builtins(value)), indent=2)


def _unused(context: typer.Context, by: str, names: tuple[str, ...]) -> None:
    """Refuse flags that were given but would not be looked at."""
    sources = ((name, context.get_parameter_source(name)) for name in names)
    given = [f"--{name.replace('_', '-')}" for name, source in sources if source is not None and source.name == "COMMANDLINE"]
    if given:
        raise UsageError(f"{' and '.join(given)} would not be used by {by}: leave {'it' if len(given) == 1 else 'them'} out")


def _listed(text: str) -> tuple[str, ...]:
    """The names in `a,b,c`; UsageError where a place is empty."""
    names = tuple(name.strip() for name in text.split(","))
    if "" in names:
        raise UsageError(f"'{text}' leaves a place empty: write what is meant with one comma between two, as a,b,c")
    return names


def _version(asked: bool) -> None:
    if asked:
        print(f"toolchain {toolchain.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (before or after the verb).")] = False,
) -> None:
    pass


@app.command(epilog=_examples("doctor", "doctor --json"))
def doctor(json: Json = False) -> None:
    """Say what this machine can do.

    Python, torch, CUDA, each target and how to get it, and the data sets found.
    """
    _print(toolchain.doctor(), json)


@app.command(epilog=_examples("models", "models --json"))
def models(json: Json = False) -> None:
    """List the networks that come with the package."""
    from toolchain.doctor import list_models

    _print(list_models(), json)


@app.command(epilog=_examples("targets", "targets --json"))
def targets(json: Json = False) -> None:
    """List the targets and how to get them."""
    from toolchain.doctor import list_targets

    _print(list_targets(), json)


@app.command(
    epilog=_examples(
        "train mnist-fc --dataset mnist --epochs 14 -o runs/mnist-fc", "train digits-fc --epochs 3 --set train.lr=0.02 -o runs/try"
    )
)
def train(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|CONFIG.yaml", help="A name from `toolchain models`, a configuration, or a run whose weights to begin with."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", parser=_path, metavar="RUN", help="The run folder to write.")],
    method: Annotated[
        str | None, typer.Option(metavar="M", help="ide, spide, dsr, ottt-a, ottt-o, saf-e or saf-f; the configuration's by default.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(metavar="D", help="digits, mnist or fashion-mnist; the model's own by default.")] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Passes over the training data; the model's own by default.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="S", help="Seed of weights and order; the configuration's, or 0, by default.")] = None,
    device: Device = "auto",
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run folder stopped.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Train a network and write a run folder.

    RUN holds checkpoint.safetensors (best on held-out training data), last.safetensors, config.yaml and metrics.jsonl. Several processes:
    torchrun --nproc-per-node 2 -m toolchain train MODEL -o RUN.
    """
    outcome = toolchain.train(
        model,
        method=method,
        dataset=dataset,
        epochs=epochs,
        seed=seed,
        device=device,
        settings=settings or [],
        resume=resume,
        output=output,
        data_dir=data_dir,
    )
    if processes.speaks():
        _print(outcome)


@app.command(
    epilog=_examples("compile mnist-fc -o mnist-fc.fsnn", "compile runs/mnist-fc --weight-bits 6 --timing pipelined -o small.fsnn")
)
def compile(
    context: typer.Context,
    model: Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", parser=_path, metavar="FILE.fsnn", help="The artefact to write; missing folders are made.")
    ],
    target: Annotated[str, typer.Option(metavar="T", help="The target whose passes run.")] = "lava-sim",
    chip: Annotated[str, typer.Option(metavar="loihi2|loihi1", help="The chip whose limits hold.")] = "loihi2",
    weight_bits: Annotated[int, typer.Option(metavar="BITS", help="Bits of a weight's mantissa, 2 to 8.")] = 8,
    time_steps: Annotated[int | None, typer.Option(metavar="T", help="Forward time steps; the model's own by default.")] = None,
    feedback_steps: Annotated[int | None, typer.Option(metavar="TB", help="Feedback time steps; the model's own by default.")] = None,
    timing: Annotated[str, typer.Option(metavar="exact|pipelined", help="Hardware time.")] = "exact",
    input: Annotated[str, typer.Option(metavar="bias|graded", help="How the input reaches the chip.")] = "bias",
    calibrate: Annotated[str | None, typer.Option(metavar="D", help="A data set whose training samples say how far numbers go.")] = None,
    settings: Settings = None,
    dump_after: Annotated[str | None, typer.Option(metavar="PASS", help="Print the graph after this pass, or after 'lower', too.")] = None,
    no_float: Annotated[bool, typer.Option("--no-float", help="Leave the float tensors out of the artefact.")] = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Compile a network to a .fsnn file for one chip.

    A network of the catalogue that comes without trained weights gets random ones, and its notes say so.
    """
    if calibrate is None:
        _unused(context, "compile without --calibrate", ("data_dir",))
    outcome = toolchain.compile(
        model,
        target=target,
        chip=chip,
        weight_bits=weight_bits,
        time_steps=time_steps,
        feedback_steps=feedback_steps,
        timing=timing,
        input=input,
        calibrate=calibrate,
        data_dir=data_dir,
        settings=settings or [],
        dump_after=dump_after,
        float_tensors=not no_float,
        output=output,
    )
    _print(outcome, json)


@app.command(
    epilog=_examples(
        "inspect mnist-fc.fsnn", "inspect mnist-fc --after adjoint --json", "inspect vgg-f --svg graph.svg --chip-svg chips.svg"
    )
)
def inspect(
    model: Model,
    after: Annotated[
        str | None, typer.Option(metavar="PASS", help="Show the graph as this pass leaves it, or 'lower': before any.")
    ] = None,
    processes: Annotated[bool, typer.Option("--processes", help="List what will run as Lava processes, with their ticks.")] = False,
    svg: Annotated[Path | None, typer.Option(parser=_path, metavar="FILE", help="Draw the graph; with --processes, those.")] = None,
    chip_svg: Annotated[Path | None, typer.Option(parser=_path, metavar="FILE", help="Draw how full the cores are.")] = None,
    analysis: Annotated[
        bool, typer.Option("--analysis", help="Say how far potentials can go, whether loops settle, and what rounding costs.")
    ] = False,
    json: Json = False,
) -> None:
    """Show the graph, its passes, its units and its cores."""
    _print(toolchain.inspect(model, after=after, processes=processes, svg=svg, chip_svg=chip_svg, analysis=analysis), json)


@app.command(
    epilog=_examples(
        "deploy mnist-fc --target lava-sim --samples 100",
        "deploy mnist-fc.fsnn --target sim --predictions out.npz --json",
        "deploy mnist-fc --target lava-sim --jobs 2",
        "deploy mnist-fc --target lava-sim --scheduler tcp://127.0.0.1:8786",
    )
)
def deploy(
    context: typer.Context,
    model: Model,
    target: Annotated[str, typer.Option(metavar="T", help="A name from `toolchain targets`.")],
    dataset: Dataset = "mnist-1k",
    samples: Samples = None,
    batch: Annotated[str, typer.Option(metavar="auto|B", help="Samples that run side by side.")] = "auto",
    jobs: Annotated[int, typer.Option(metavar="J", help="Processes of this machine that share the samples.")] = 1,
    scheduler: Annotated[str | None, typer.Option(metavar="ADDRESS", help="A Dask scheduler whose workers share the samples.")] = None,
    synapses: Annotated[str, typer.Option(metavar="own|stock", help="lava-sim: our synapse processes, or Lava's.")] = "own",
    device: Device = "auto",
    fallback: Fallback = None,
    predictions: Annotated[
        Path | None, typer.Option(parser=_path, metavar="FILE.npz", help="Write predictions, labels, logits and rates.")
    ] = None,
    resume: Resume = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Run a network over a data set on one target.

    The result is accuracy, speed, spikes and synaptic operations.
    """
    if jobs < 1:
        raise UsageError(f"--jobs takes a whole number from 1, not {jobs}")
    if scheduler is not None:
        _unused(context, "--scheduler, whose workers are the jobs", ("jobs",))
    outcome = toolchain.deploy(
        model,
        target=target,
        dataset=dataset,
        samples=samples,
        batch=batch if batch == "auto" else _whole(batch, "--batch"),
        jobs=jobs,
        scheduler=scheduler,
        synapses=synapses,
        device=device,
        fallback=fallback,
        predictions=predictions,
        resume=resume,
        data_dir=data_dir,
    )
    _print(outcome, json)


@app.command(
    epilog=_examples("compare mnist-fc --report out/report", "compare mnist-fc --targets torch,sim --samples 200 --max-drop 0.5 --json")
)
def compare(
    model: Model,
    targets: Annotated[str, typer.Option(metavar="A,B,...", help="Targets; the first is compared with.")] = "torch,sim,lava-sim",
    dataset: Dataset = "mnist-1k",
    samples: Samples = None,
    device: Device = "auto",
    max_drop: Annotated[float | None, typer.Option(metavar="POINTS", help="Exit 4 where accuracy drops by more percentage points.")] = None,
    budget_samples: Annotated[
        int | None,
        typer.Option(metavar="N", help="Samples on which the drop is split into its causes, 0 for none; by default what takes seconds."),
    ] = None,
    report: Annotated[Path | None, typer.Option(parser=_path, metavar="DIR", help="Write an HTML page and pictures there.")] = None,
    fallback: Fallback = None,
    resume: Resume = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Show where and why targets differ.

    Each target runs the same samples, forward and feedback, and is compared with the first.
    """
    outcome = toolchain.compare(
        model,
        targets=_listed(targets),
        dataset=dataset,
        samples=samples,
        device=device,
        max_drop=max_drop,
        report=report,
        fallback=fallback,
        data_dir=data_dir,
        budget_samples=budget_samples,
        resume=resume,
    )
    _print(outcome, json)
    if not outcome.passed:
        raise ToleranceError(f"the accuracy of '{model}' drops by more than {max_drop} points: see the table")


@app.command(
    epilog=_examples(
        "verify mnist-fc --samples 20", "verify mnist-fc.fsnn --targets reference,sim --phase feedback", "verify mnist-fc.fsnn --replay"
    )
)
def verify(
    context: typer.Context,
    model: Model,
    targets: Annotated[str, typer.Option(metavar="A,B,...", help="Targets that must agree.")] = "reference,sim,lava-sim",
    dataset: Dataset = "mnist-1k",
    samples: Samples = None,
    phase: Annotated[str, typer.Option(metavar="forward|feedback|both", help="What to compare.")] = "both",
    probes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Probing inputs beside the images, and as many for each of two variants of the network; 0 for none; 16, of large networks fewer.",
        ),
    ] = None,
    replay: Annotated[bool, typer.Option("--replay", help="Run the golden inputs kept in the artefact.")] = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Prove that targets compute the same.

    Every spike, potential and saturation is compared, and what share of the weights the inputs exercised is said; exit 4 where one differs.
    """
    if replay:
        _unused(context, "--replay, which runs the inputs kept in the artefact", ("dataset", "samples", "phase", "probes", "data_dir"))
    outcome = toolchain.verify(
        model,
        targets=_listed(targets),
        dataset=dataset,
        samples=samples,
        phase=phase,
        probes=probes,
        replay=replay,
        data_dir=data_dir,
    )
    _print(outcome, json)
    if not outcome.passed:
        raise ToleranceError(f"the targets do not compute the same for '{model}': see the first difference above")


@app.command(
    epilog=_examples(
        "tune mnist-fc --max-drop 0.2 --picture out/pareto.png -o small.fsnn",
        "tune runs/mine --dataset fashion-mnist --samples 2000 --json",
    )
)
def tune(
    model: Model,
    dataset: Annotated[
        str | None, typer.Option(metavar="D", help="A data set with a training part; what MODEL trained on by default.")
    ] = None,
    max_drop: Annotated[float, typer.Option(metavar="POINTS", help="Percentage points of accuracy that may be lost.")] = 0.5,
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="The last N training samples judge; by default those that training held out.")
    ] = None,
    input: Annotated[
        str | None, typer.Option(metavar="bias|graded", help="How the input reaches the chip; bias by default, of a .fsnn file its own.")
    ] = None,
    device: Device = "auto",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", parser=_path, metavar="FILE.fsnn", help="Write the chosen network as an artefact.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(parser=_path, metavar="FILE", help="Draw the Pareto front: .png or .svg.")] = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Find the weight bits and time steps with the fewest synaptic operations.

    Held-out training samples decide, the test set is run once with what was chosen; exit 4 where nothing is within --max-drop.
    """
    outcome = toolchain.tune(
        model,
        dataset=dataset,
        max_drop=max_drop,
        samples=samples,
        input=input,
        output=output,
        picture=picture,
        device=device,
        data_dir=data_dir,
    )
    _print(outcome, json)
    if not outcome.passed:
        raise ToleranceError(outcome.shortfall)


@app.command(
    epilog=_examples(
        "learn digits-fc --target lava-sim --dataset digits --epochs 8 -o runs/on-chip",
        "learn digits-fc --target sim --dataset digits --readout-only --set learn.lr=0.5 --json",
    )
)
def learn(
    model: Model,
    target: Annotated[str, typer.Option(metavar="T", help="Where both equilibria run and, on lava-sim, the weights change.")],
    dataset: Annotated[str, typer.Option(metavar="D", help="A data set with a training part.")],
    samples: Annotated[int | None, typer.Option(metavar="N", help="How many training samples, from the first; all by default.")] = None,
    epochs: Annotated[int, typer.Option(metavar="N", help="Passes over the samples.")] = 5,
    batch: Annotated[int, typer.Option(metavar="B", help="Samples that change the weights together.")] = 16,
    seed: Annotated[int, typer.Option(metavar="S", help="Seed of first weights, order and rounding.")] = 0,
    weights: Annotated[str, typer.Option(metavar="float|int8", help="Floating point, or 8-bit weights rounded at random.")] = "int8",
    hidden_only: Annotated[bool, typer.Option("--hidden-only", help="The readout stays as it is.")] = False,
    readout_only: Annotated[bool, typer.Option("--readout-only", help="Only the readout learns.")] = False,
    test_samples: Annotated[int | None, typer.Option(metavar="N", help="How many test samples judge; all by default.")] = None,
    settings: Settings = None,
    fallback: Fallback = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", parser=_path, metavar="RUN", help="A folder for the learned network and its curve.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run folder stopped.")] = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Train a network on a target by local updates.

    Both equilibria run there as spikes, and each connection learns from its two ends. A network of the catalogue starts from random weights.
    """
    outcome = toolchain.learn(
        model,
        target=target,
        dataset=dataset,
        samples=samples,
        epochs=epochs,
        batch=batch,
        seed=seed,
        weights=weights,
        hidden_only=hidden_only,
        readout_only=readout_only,
        settings=settings or [],
        test_samples=test_samples,
        fallback=fallback,
        output=output,
        resume=resume,
        data_dir=data_dir,
    )
    _print(outcome, json)


@app.command(
    epilog=_examples(
        "export mnist-fc --format nir -o mnist-fc.nir",
        "export mnist-fc --format onnx -o mnist-fc.onnx",
        "export digits-fc --format nir --approximate --dataset digits -o digits.nir",
        "export mnist-fc --format netx --approximate -o mnist-fc.net",
    )
)
def export(
    context: typer.Context,
    model: Model,
    format: Annotated[str, typer.Option(metavar="nir|onnx|netx", help="What to write; netx is lava-dl's.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", parser=_path, metavar="FILE", help="The file to write; missing folders are made.")
    ],
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Write what the format carries, say what is lost, and measure it.")
    ] = False,
    dataset: Dataset = "mnist-1k",
    samples: Annotated[int, typer.Option(metavar="N", help="How many samples judge the file, from the first.")] = 200,
    calibrate: Annotated[str | None, typer.Option(metavar="D", help="A data set whose training samples set thresholds.")] = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Write a network in another library's format.

    What the format would silently lose is refused, and said. A NIR file holds the exact network, a part of it in metadata; with --approximate it is one for readers
    of NIR's own nodes, which reset to zero, and so are all netx files: their loss is listed, and measured against the exact graph. An ONNX file computes the float
    network's inference, as onnxruntime is shown to do before it is written.
    """
    if format == "nir" and not approximate:
        _unused(context, "an exact NIR file, which loses nothing to measure", ("dataset", "samples", "data_dir"))
    outcome = toolchain.export(
        model,
        format=format,
        output=output,
        approximate=approximate,
        dataset=dataset,
        samples=samples,
        calibrate=calibrate,
        data_dir=data_dir,
    )
    _print(outcome, json)


@app.command(
    "import",
    epilog=_examples(
        "import mnist-fc.nir -o runs/mnist-fc",
        "import snntorch.nir --time-steps 25 --reset subtract-delayed -o runs/imported",
        "import relu.onnx --calibrate fashion-mnist --dataset fashion-mnist --feedback -o runs/imported",
        "import x.nir --json",
    ),
)
def import_(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(parser=_path, metavar="PATH", help="The file to read.")],
    format: Annotated[str | None, typer.Option(metavar="nir|onnx", help="What the file is; its ending says so by default.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", parser=_path, metavar="RUN|FILE.fsnn", help="The run folder, or of an exported artefact the file, to write."
        ),
    ] = None,
    time_steps: Annotated[int | None, typer.Option(metavar="T", help="Forward time steps, which files of others do not say.")] = None,
    reset: Annotated[
        str,
        typer.Option(
            metavar="subtract|subtract-delayed", help="NIR of others: spikes subtract the threshold at once, or a step late (snnTorch)."
        ),
    ] = "subtract",
    dt: Annotated[
        float, typer.Option(metavar="SECONDS", help="NIR of others: how long a time step is in the file's time constants.")
    ] = 1e-4,
    feedback: Annotated[
        bool, typer.Option("--feedback", help="ONNX: add a feedback connection with weights of 0, for training to start from.")
    ] = False,
    normalize: Annotated[
        str | None, typer.Option(metavar="MEAN/STD", help="ONNX: what images go through before the file, as 0.1307/0.3081.")
    ] = None,
    calibrate: Annotated[str | None, typer.Option(metavar="D", help="ONNX: a data set whose training samples scale firing rates.")] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="D", help="ONNX: a data set on which the file and the network are measured.")
    ] = None,
    samples: Samples = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Read a network from another library's file.

    A NIR file that export wrote gives back the same network, to the last bit; NIR files of others a network to compile, deploy or train, with a warning for all that may
    differ. A plain ReLU network in an ONNX file becomes a spiking one whose firing rates stand for its activations.
    """
    options = _options(
        context,
        reset=reset,
        dt=dt,
        feedback=feedback,
        normalize=normalize,
        calibrate=calibrate,
        dataset=dataset,
        samples=samples,
        data_dir=data_dir,
    )
    outcome = toolchain.import_(path, format=format, output=output, time_steps=time_steps, **options)
    _print(outcome, json)


def _options(context: typer.Context, **values: Any) -> dict[str, Any]:
    """Those of `values` that the command line gives: options of one format, which others refuse."""
    sources = {name: context.get_parameter_source(name) for name in values}
    return {name: value for name, value in values.items() if (found := sources[name]) is not None and found.name == "COMMANDLINE"}


@app.command(
    epilog=_examples(
        "estimate mnist-fc --samples 200",
        "estimate convnet-f --dataset mnist --samples 1000 --chip-samples 0 --json",
        "estimate mnist-fc --pareto --weight-bits 8,4,3 --time-steps 30,8,4,2 --picture out/energy.png",
    )
)
def estimate(
    context: typer.Context,
    model: Model,
    dataset: Dataset = "mnist-1k",
    samples: Samples = None,
    batch: Annotated[
        int | None, typer.Option(metavar="B", help="Samples of the batch whose mean loss drives the feedback phase; training's by default.")
    ] = None,
    chip_samples: Annotated[
        int | None, typer.Option(metavar="N", help="How many of the samples SANA-FE runs; 10 by default, with --pareto 0.")
    ] = None,
    mac_pj: Annotated[float | None, typer.Option(metavar="PJ", help="Price of one product in picojoules; 4.6 by default.")] = None,
    ac_pj: Annotated[float | None, typer.Option(metavar="PJ", help="Price of one addition in picojoules; 0.9 by default.")] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Accuracy and energy at several weight bits and time steps.")] = False,
    weight_bits: Annotated[str, typer.Option(metavar="A,B,...", help="With --pareto: bits of weights, 2 to 8.")] = "8,6,4,3",
    time_steps: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="With --pareto: time steps; T, T/2, T/4, ... 1 by default.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(parser=_path, metavar="FILE", help="With --pareto: draw it, .png or .svg.")] = None,
    device: Device = "auto",
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Estimate energy and latency, every figure simulated or declared, with its source.

    Operations by NeuroBench's definitions, SPIDE's theoretical energy of inference and training from measured rates, ticks, and where SANA-FE is installed its
    simulated Loihi.
    """
    options: dict[str, Any] = {
        "dataset": dataset,
        "samples": samples,
        "mac_pj": mac_pj,
        "ac_pj": ac_pj,
        "device": device,
        "data_dir": data_dir,
    }
    if chip_samples is not None:
        options["chip_samples"] = chip_samples
    if not pareto:
        _unused(context, "estimate without --pareto", ("weight_bits", "time_steps", "picture"))
        _print(toolchain.estimate(model, batch=batch, **options), json)
        return
    _unused(context, "--pareto, which runs the forward phase only", ("batch",))
    from toolchain.tradeoff import tradeoff

    steps = None if time_steps is None else _wholes(time_steps, "--time-steps")
    _print(tradeoff(model, weight_bits=_wholes(weight_bits, "--weight-bits"), time_steps=steps, picture=picture, **options), json)


def _wholes(text: str, flag: str) -> tuple[int, ...]:
    """The whole numbers in `a,b,c`."""
    words = _listed(text)
    if not words or not all(word.isdecimal() for word in words):
        raise UsageError(f"{flag} takes whole numbers with commas between, not '{text}'")
    return tuple(int(word) for word in words)


def _whole(text: str, flag: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"{flag} takes 'auto' or a whole number, not '{text}'")
    return int(text)


def main() -> NoReturn:
    """The command `toolchain`. Exit codes: 0 done, 1 the tool's error, 2 usage, 3 does not fit the chip, 4 outside a tolerance, 130 interrupted."""
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = "--debug" in sys.argv[1:]
    try:
        _open_streams()
        _require_folder()
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it keeps its cache is not the user's business
        endings.watch()
        shortage.keep_reserve()
        if not debug:
            shortage.quiet_threads()
        if shortage.one_thread_if_short():
            say(
                "toolchain: there are too few threads for all cores (`ulimit -u` or the container sets how many), so every library runs in one"
            )
        if not {"-h", "--help", "--version"} & set(arguments or ["-h"]):
            shortage.hold_blas()
        code = typer.main.get_command(app)(arguments or ["--help"], prog_name="toolchain", standalone_mode=False)
        if code == INTERRUPTED:  # typer makes this of KeyboardInterrupt, and no verb returns it
            raise KeyboardInterrupt
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = _failed("interrupted", INTERRUPTED) if processes.speaks() else INTERRUPTED
    except SystemExit as left:
        # of several processes, torchrun terminates those that outlive one that failed, which has said why
        code = _failed("terminated", TERMINATED) if left.code == TERMINATED and processes.alone() else left.code
    except ToolchainError as error:
        code = _failed(str(error), error.exit_code, debug) if shortage.found(error) is None else _unexpected(error, arguments, debug)
    except typer.TyperException as error:
        said = f"{error.format_message().rstrip('.')}: see toolchain {_verb_of(arguments)}--help"
        code = _failed(said, 2, debug) if processes.speaks() else 2
    except Exception as error:  # the boundary: whatever it is, a person reads one sentence
        code = _unexpected(error, arguments, debug)
    endings.arrived()
    # what is left is the interpreter's own end; a signal there would kill it after the result is out
    for number in (signal.SIGINT, signal.SIGTERM):
        atexit.register(signal.signal, number, signal.SIG_IGN)
    sys.exit(code)


def _open_streams() -> None:
    """A stream that the shell closed goes to the null device; else the next file opened would take its number. What one cannot carry it gets as an escape."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _require_folder() -> None:
    """Libraries look for their own parts from the working directory: MKL ends the program without it."""
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError(f"the working directory is gone ({error.strerror}): change to one that exists") from None


def last_words() -> str:
    """What is left to say where a library ends the program; with --debug nothing, and it ends as it would without us."""
    if "--debug" in sys.argv:
        return ""
    what = f"{_asked(sys.argv[1:])} was ended by a library that could not go on, most often for want of memory"
    missing = shortage.Shortage("memory", "")
    return f"toolchain: {what}: {missing.remedy(_lowered(sys.argv[1:]))}; with --debug it crashes as it is\n"


def _unexpected(error: Exception, arguments: list[str], debug: bool) -> int:
    shortage.free(error)
    missing = shortage.found(error)
    if missing is not None:
        return _failed(f"{_asked(arguments)} {missing.sentence}: {missing.remedy(_lowered(arguments))}", 1, debug)
    if isinstance(error, UnicodeEncodeError):
        return _failed(
            f"{error.object[error.start : error.end]!a} in a name is no text ({error.reason}): rename the file or folder", 2, debug
        )
    if not isinstance(error, OSError):
        return _failed(f"unexpected {type(error).__name__}: {error}; run again with --debug to see where", 1, debug)
    _give_up_stdout()
    if isinstance(error, BrokenPipeError):  # the reader of stdout left, on purpose
        return 1
    what = "stdout, a file or shared memory" if error.filename is None else f"'{error.filename}'"
    return _failed(f"cannot read or write {what} ({error.strerror}): choose a place that is whole, permitted and has free space", 1, debug)


def _give_up_stdout() -> None:
    """Where stdout takes nothing any more, the interpreter's own flush at exit must not complain again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _asked(arguments: list[str]) -> str:
    """The verb and its first argument."""
    return " ".join(arguments[: 2 if len(arguments) > 1 and not arguments[1].startswith("-") else 1])


def _lowered(arguments: list[str]) -> list[str]:
    """The flags of the verb by which it takes less of the machine."""
    if arguments[:1] == ["train"]:
        return ["--set train.batch"]
    callbacks = [command.callback for command in app.registered_commands if arguments[:1] == [_name(command)]]
    found = [f"--{name}" for name in ("batch", "samples") if callbacks and name in callbacks[0].__annotations__]
    return ["--jobs"] * any(word.startswith("--jobs") for word in arguments) + found


def _name(command: Any) -> str:
    """A verb as it is typed."""
    return str(command.name or getattr(command.callback, "__name__", ""))


def _verb_of(arguments: list[str]) -> str:
    verbs = {_name(command) for command in app.registered_commands}
    return f"{arguments[0]} " if arguments and arguments[0] in verbs else ""


def _failed(message: str, code: int, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    reasons = [" ".join(part.split()) for part in message.split("\n- ")]  # one sentence, or a line for each of several reasons
    say("toolchain: " + "\n  - ".join(reasons))
    return code


if __name__ == "__main__":
    main()
