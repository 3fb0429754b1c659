"""Files that were made to do harm: each is refused in the sentence that expected.yaml holds for it, runs nothing, and leaves nothing behind.

`make.py` writes the files of `files/`, and says what is hostile about each. In a sentence, <library> stands for a library's own words, which change
with its version, and <names> for a list that grows.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from toolchain.data.cifar10_dvs import CLASSES

FOLDER = Path(__file__).parent
FILES = FOLDER / "files"
EXPECTED: dict[str, str] = yaml.safe_load((FOLDER / "expected.yaml").read_text())
CODES = {"name-script.fsnn": 0, "golden-changed.fsnn": 4}
"""Where it is not 2: a name may look like a page's script, and golden vectors are compared."""

RESUME = "train config.yaml --resume -o run --device cpu"
NEEDS = {".nir": ("h5py", "nir"), ".onnx": ("onnx", "onnxruntime")}
VARYING = ("virtual.nir", "filter.nir")
"""HDF5 leaves some of their bytes unset."""

Files = dict[str, bytes]


def require(name: str) -> None:
    """Skip where the package that reads such files is missing here."""
    for package in NEEDS.get(Path(name).suffix, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def says(pattern: str, text: str) -> bool:
    """Whether `text` is the sentence; what stands in <> may be anything on the line."""
    return re.fullmatch("[^\n]+".join(re.escape(part) for part in re.split(r"<(?:library|names)>", pattern)), text) is not None


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def laid(
    small: Callable[[tuple[int, ...], str], bytes], run_folder: Files, scripts: dict[str, ModuleType]
) -> Callable[..., tuple[Files, str]]:
    """`laid(name, content)`: the files to put into an empty folder, and the command that reads the hostile one."""

    def deployed(dataset: str, shape: tuple[int, ...], files: Files) -> tuple[Files, str]:
        words = f"deploy small.safetensors --target torch --device cpu --dataset {dataset} --data-dir data --samples 1"
        return {"small.safetensors": small(shape, dataset), **files}, words

    def lay(name: str, content: bytes) -> tuple[Files, str]:
        idx = scripts["of_data"].idx
        ending = ".gz" if name.endswith(".gz") else ""
        if name.startswith("metrics-"):
            return run_folder | {"run/metrics.jsonl": content}, RESUME
        if name.startswith("last-"):
            return run_folder | {"run/last.safetensors": content}, RESUME
        if name.startswith("lesson-"):
            return {
                "run/last.safetensors": content
            }, "learn digits-fc --target reference --dataset digits --samples 32 --epochs 1 -o run --resume"
        if name.startswith("idx-"):
            images, labels = content, idx((1,), bytes(1))
        elif name.startswith("labels-"):
            images, labels = idx((1, 28, 28), bytes(784)), content
        if name.startswith(("idx-", "labels-")):
            place = "data/mnist/t10k-"
            return deployed("mnist", (1, 28, 28), {f"{place}images-idx3-ubyte{ending}": images, f"{place}labels-idx1-ubyte": labels})
        if name.startswith("nmnist-"):
            return deployed("nmnist", (2, 34, 34), {f"data/nmnist/Test/{digit}/1.bin": content for digit in range(10)})
        if name.startswith("aedat-"):
            places = [f"data/cifar10-dvs/{kind}/cifar10_{kind}_900.aedat" for kind in CLASSES]
            return deployed("cifar10-dvs", (2, 48, 48), dict.fromkeys(places, content))
        cifar = {
            ".pickle": "cifar-10-batches-py/test_batch",
            ".tar.gz": "cifar-10-python.tar.gz",
            ".bin": "cifar-10-batches-bin/test_batch.bin",
        }
        for suffix, place in cifar.items():
            if name.endswith(suffix):
                return deployed("cifar10", (3, 32, 32), {f"data/cifar10/{place}": content})
        verbs = {
            ".yaml": "train {} -o run --device cpu",
            ".nir": "import {} --time-steps 4 -o run",
            ".onnx": "import {} --time-steps 4 -o run",
        }
        replay = "verify {} --replay --targets reference,sim"
        return {name: content}, (replay if name.startswith("golden-changed") else verbs.get(Path(name).suffix, "inspect {}")).format(name)

    return lay


@pytest.mark.parametrize("name", EXPECTED)
def test_every_file_has_its_sentence(
    name: str, command: Any, laid: Any, watch: Any, cache: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    require(name)
    files, words = laid(name, (FILES / name).read_bytes())
    for place, content in files.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(content)
    before = tree(tmp_path)
    answer = command(*words.split())
    assert answer.code == CODES.get(name, 2)
    assert says(f"toolchain: {EXPECTED[name]}\n" if EXPECTED[name] else "", answer.err), answer.err
    assert answer.code in (0, 4) or answer.out == ""
    assert tree(tmp_path) == before
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert watch.seen == []
    assert not list(recwarn)
    assert answer.out.isprintable() or set(re.findall(r"[^ -~]", answer.out)) <= {"\n"}


def test_the_pickles_would_run_and_the_watch_would_see_it(watch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    watch.on = True
    pickle.loads((FILES / "pickle.fsnn").read_bytes())
    watch.on = False
    assert watch.seen == ["pickle.find_class", "os.system"]
    watch.seen.clear()
    assert (tmp_path / "canary").exists()


def test_every_file_is_expected() -> None:
    assert {path.name for path in FILES.iterdir()} == set(EXPECTED)
    assert len(EXPECTED) > 150


def test_the_script_writes_the_same_files(scripts: dict[str, ModuleType]) -> None:
    for name in ("a.nir", "a.onnx"):
        require(name)
    made = {name: content for name, what, content in scripts["make"].made() if what}
    assert made.keys() == set(EXPECTED)
    assert [name for name, content in made.items() if name not in VARYING and content != (FILES / name).read_bytes()] == []


# places that are no files


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def listener(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


NO_PLAIN = "'{}' is a folder, pipe, socket or device: give a file"
READERS = {
    "inspect": ("x.fsnn", "inspect x.fsnn", NO_PLAIN),
    "train": ("x.yaml", "train x.yaml -o run --device cpu", NO_PLAIN),
    "resume": ("run/metrics.jsonl", RESUME, NO_PLAIN),
    "import": ("x.nir", "import x.nir", "there is no file '{}': check the path"),
}
NOTHING = {
    "inspect": "there is no file 'x.fsnn': check the path",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("make", [fifo, endless, folder, listener], ids=lambda make: make.__name__)
def test_what_is_no_file_is_not_waited_for(
    reader: str, make: Callable[[Path], None], command: Any, run_folder: Files, tmp_path: Path
) -> None:
    place, words, sentence = READERS[reader]
    require(place)
    for name, content in run_folder.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / place).unlink(missing_ok=True)
    os.chdir((tmp_path / place).parent)
    make(tmp_path / place)
    os.chdir(tmp_path)
    answer = command(*words.split())
    assert (answer.code, answer.out, answer.err) == (2, "", f"toolchain: {sentence.format(place)}\n")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("x.fsnn", "inspect x.fsnn"),
        ("x.yaml", "train x.yaml -o run"),
        ("x.onnx", "import x.onnx"),
        ("run", "inspect run"),
        ("run/checkpoint.safetensors", "inspect run"),
    ],
)
def test_a_link_to_itself_is_one_sentence(place: str, words: str, command: Any, tmp_path: Path) -> None:
    require(place)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    loop(tmp_path / place)
    answer = command(*words.split())
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert "unexpected" not in answer.err
    assert place.partition("/")[0] in answer.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
@pytest.mark.parametrize("reader", READERS)
def test_what_may_not_be_read_is_named(reader: str, command: Any, run_folder: Files, tmp_path: Path) -> None:
    place, words, _ = READERS[reader]
    require(place)
    for name, content in run_folder.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / place).write_bytes(b"")
    (tmp_path / place).chmod(0)
    answer = command(*words.split())
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert place in answer.err


def test_a_file_that_grows_while_it_is_read_is_left(command: Any, tmp_path: Path) -> None:
    path, stopped = tmp_path / "x.yaml", threading.Event()
    path.write_bytes(b"model: digits-fc\n#" + b"." * (1 << 18))

    def grow() -> None:
        with path.open("ab") as stream:
            while not stopped.is_set():
                stream.write(b"#\n" * 1000)

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        answer = command("train", "x.yaml", "-o", "run")
    finally:
        stopped.set()
        thread.join()
    assert (answer.code, answer.err) == (2, "toolchain: 'x.yaml' has more than 262,144 bytes: it is another kind of file, or still grows\n")


# what the command line takes

WORDS = {
    "train digits-fc -o run --set train.lr=!!python/object/apply:os.system['touch'] ": "setting 'train.lr=!!python/object/apply:os.system['touch']' has a value that is not plain YAML: write a number, a word or [a, list]",
    "train digits-fc -o run --set __class__.__init__=1": "--set: unknown setting '__class__': choose one of <names>",
    "train digits-fc -o run --set train.lr=1e999": "--set: 'train.lr' is inf: give a finite number",
    "compile digits-fc -o x.fsnn --set partition.__class__=1": "pass 'partition' has no option '__class__': it has <names>",
    "compile digits-fc -o x.fsnn --chip ../../etc/passwd": "unknown chip '../../etc/passwd': choose one of loihi1, loihi2",
    "compile digits-fc -o x.fsnn --target os.system": "unknown target 'os.system': choose one of <names>",
    "deploy digits-fc --target sim --dataset ../../etc": "unknown data set '../../etc': choose one of <names>",
    "inspect toolchain.models.digits_fc:build": "there is no model 'toolchain.models.digits_fc:build': give a file or run folder that exists, or one of <names>",
    "inspect /etc/passwd": "'/etc/passwd' is damaged or no safetensors file (<library>): restore it, or train again",
    "train os:system -o run": "'os:system' is neither a network (<names>) nor a CONFIG.yaml, run folder or checkpoint: give one of them",
    "train digits-fc --method os.system -o run": "unknown method 'os.system': choose one of <names>",
    f"inspect {'a' * 300}.fsnn": "'<names>' cannot be read (File name too long): check the path",
    f"train {'a' * 300}.yaml -o run": "config '<names>' cannot be read (File name too long): check the path",
    "inspect \u001b[2J.fsnn": "there is no file '\\u001b[2J.fsnn': check the path",
}


@pytest.mark.parametrize("words", WORDS)
def test_words_that_look_like_code_are_names(words: str, command: Any, tmp_path: Path) -> None:
    answer = command(*words.split())
    assert (answer.code, answer.out) == (2, "")
    assert says(f"toolchain: {WORDS[words]}\n", answer.err), answer.err
    assert tree(tmp_path) == {}


@pytest.mark.slow
def test_a_name_is_text_on_the_page_and_no_place_for_its_pictures(command: Any, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "x.fsnn").write_bytes((FILES / "name-script.fsnn").read_bytes())
    words = "compare inside/x.fsnn --targets reference,sim --dataset digits --samples 2 --report inside/report"
    answer = command(*words.split())
    assert answer.code == 0, answer.err
    page = (tmp_path / "inside" / "report" / "index.html").read_text()
    assert "<script" not in page
    assert "../../&lt;script&gt;alert(1)" in page
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
