"""Files of a run and of the cache that are no such files: nothing waits for them, and no more memory is taken for them than they are worth."""

from __future__ import annotations

import json
import os
import struct
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest

from toolchain import lesson, metrics, partial
from toolchain.errors import ArtifactError
from toolchain.exchange import nir_files, onnx_files


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> partial.Partial:
    """A question of which nothing is saved; what is saved lies in tmp_path."""
    monkeypatch.setattr(partial, "_root", lambda: tmp_path)
    facts: dict[str, str | int] = {"model": "a", "target": "b", "dataset": "c"}
    return partial.Partial(
        partial.Question("a", "b", "c", 10, lambda: facts, lambda part: np.zeros(1), lambda part, found: True, 1000), saves=True
    )


@pytest.mark.parametrize(
    "content", [b'{"model":' + b"[" * 20_000, b'{"model":"\xff\xfe"}', b"[]", b" " * (partial.LARGEST_QUESTION + 1), None]
)
def test_a_question_that_is_none_is_passed_over(
    asked: partial.Partial, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    (tmp_path / "other").mkdir()
    if content is None:
        os.mkfifo(tmp_path / "other" / "question.json")
    else:
        (tmp_path / "other" / "question.json").write_bytes(content)
    asked.begin(resume=True)
    assert capsys.readouterr().err == "toolchain: nothing is saved of a on b: it starts with the first sample\n"


@pytest.mark.parametrize("name", ["-5.answers", "5-.answers", "٣-٣.answers", "1-2-3.answers"])
def test_a_name_that_no_run_gives_is_no_answer(asked: partial.Partial, capsys: pytest.CaptureFixture[str], name: str) -> None:
    asked._folder.mkdir()
    (asked._folder / name).touch()
    asked.begin(resume=True)
    asked.begin(resume=False)
    assert capsys.readouterr().err == "toolchain: nothing is saved of a on b: it starts with the first sample\n"


def test_a_pipe_in_place_of_answers_is_passed_over(asked: partial.Partial, capsys: pytest.CaptureFixture[str]) -> None:
    asked._folder.mkdir()
    os.mkfifo(asked._folder / "000000-10.answers")
    asked.begin(resume=True)
    asked.close()
    assert "000000-10.answers' is damaged or answers other inputs: samples in it run again" in capsys.readouterr().err


def test_lines_of_a_run_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / metrics.LINES
    line = msgspec.json.encode(metrics.Epoch(1, 0.7, 0.5, 0.5, 0.1, 0.01, 0.0, 0.2, 100.0, 0.1, 1.5, (0.0,)))
    path.write_bytes(line.replace(b"[0.0]", b"[" + b"0," * metrics.LONGEST + b"0]") + b"\n")
    with pytest.raises(ArtifactError, match=r"metrics.jsonl' cannot be read \(a line of 2,0\d\d,\d+ bytes\)"):
        metrics.read(path, 1)


def test_a_lesson_with_more_bytes_than_its_network_is_refused_before_they_are_read(tmp_path: Path) -> None:
    path, claimed = tmp_path / lesson.STATE, 2**30
    header = json.dumps({"a": {"dtype": "U8", "shape": [claimed], "data_offsets": [0, claimed]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + claimed)  # with a hole: it takes no room on the disk
    with pytest.raises(ArtifactError, match=r"has 1,073,741,9.. bytes, and a lesson of this network at most 1,000:"):
        lesson._begun_in(path, 1000)


def nir_file(path: Path, nodes: dict[str, dict[str, object]]) -> Path:
    h5py = pytest.importorskip("h5py")
    pytest.importorskip("nir")
    with h5py.File(path, "w") as file:
        file["node/type"], file["node/edges"] = "NIRGraph", np.array([["input", "output"]], "S6")
        for name, fields in nodes.items():
            for field, value in fields.items():
                file[f"node/nodes/{name}/{field}"] = value
    return path


def test_a_nir_file_of_endless_nodes_is_refused_before_nir_compares_them(tmp_path: Path) -> None:
    path = nir_file(tmp_path / "many.nir", {f"n{i}": {"type": "Threshold"} for i in range(nir_files.MOST_NODES)})
    with pytest.raises(ArtifactError, match=r"many.nir' has 2,001 nodes, more than 2,000: it is no network of layers$"):
        nir_files.read(path)


def test_what_nir_cannot_compute_is_refused_without_a_warning(tmp_path: Path) -> None:
    sizes = {"input_shape": [2, 2], "stride": [0, 0], "padding": [0, 0], "dilation": [1, 1]}
    fields = {"type": "Conv2d", "weight": np.ones((2, 1, 1, 1)), "groups": 1, "bias": np.zeros(2), **sizes}
    path = nir_file(tmp_path / "stride.nir", {"conv": fields})
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(ArtifactError, match="divide by zero"):
            nir_files.read(path)
    assert not heard


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no /proc")
def test_no_more_of_an_onnx_file_is_read_than_it_said_to_have() -> None:
    endless = Path("/proc/self/maps")  # a file of 0 bytes, as it says, with a content
    with pytest.raises(ArtifactError, match="has more than 0 bytes"):
        onnx_files.read(endless)
