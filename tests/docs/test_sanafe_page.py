"""What docs/targets/sanafe.md shows runs, and the bill it quotes is what comes out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from toolchain import data
from toolchain.compiler import forward_only, graph_for
from toolchain.source import find
from toolchain.targets.sanafe import SANAFE

pytest.importorskip("sanafe", reason="SANA-FE is not installed (extra energy)")

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "targets" / "sanafe.md").read_text()


def test_the_python_on_the_page_runs(capsys):
    (block,) = re.findall(r"```python[^\n]*\n(.*?)```", PAGE, re.S)
    exec(compile(block.replace("samples=10", "samples=2"), "sanafe.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "ms an image on the chip" in printed
    assert re.search(r"^packets +[\d,]+ an image$", printed, re.M)


def test_the_bill_of_mnist_fc_is_the_quoted_one():
    (spikes, synapses, joules, share, seconds) = re.search(
        r"first 10 images of mnist-1k, forward phase: ([\d,]+) spikes, ([\d,]+) synapses read, (\d+) microjoule \(synapses (\d+) %\) and ([\d.]+) ms",
        PAGE,
    ).groups()
    run = SANAFE.compile(forward_only(graph_for(find("mnist-fc"), SANAFE)))
    run.run(data.load("mnist-1k", samples=10).images)
    bill, each = run.charges, run.charges.energy_per_sample()
    assert [f"{bill.counts[name] / 10:,.0f}" for name in ("spikes", "synapses")] == [spikes, synapses]
    assert (f"{1e6 * each['total']:.0f}", f"{100 * each['synapse'] / each['total']:.0f}") == (joules, share)
    assert 1e3 * bill.seconds_per_sample() == pytest.approx(float(seconds), rel=0.05)
