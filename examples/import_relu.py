"""A ReLU network trained in PyTorch, through ONNX, as a spiking network that training goes on from. Takes seconds.

python examples/import_relu.py [folder] [digits|mnist|fashion-mnist]
"""

import inspect
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

import toolchain
from toolchain import data

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
dataset = sys.argv[2] if len(sys.argv) > 2 else "digits"

# a plain network, trained in a few seconds: ReLU, mean pooling, nothing that spikes could not follow
torch.manual_seed(0)
training = data.load(dataset, split="train")
images, labels = torch.from_numpy(np.asarray(training.images[:])), torch.from_numpy(np.asarray(training.labels))
net = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.AvgPool2d(2),
    nn.Flatten(),
    nn.Linear(4 * images[0].numel(), 64),
    nn.ReLU(),
    nn.Linear(64, 10),
)
optimizer = torch.optim.Adam(net.parameters(), 0.005)
for _ in range(max(1, 26_000 // len(images))):
    for rows in torch.randperm(len(images)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()

# torch.onnx.export(net.eval(), (images[:64],), "relu.onnx") is enough; PyTorch's newer exporter needs onnxscript, its older one is asked for here
older = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.onnx.export(net.eval(), (images[:64],), str(folder / "relu.onnx"), **older)

# training images say which activation a firing rate of 1 stands for; rates are multiples of 1 / T
for time_steps in (4, 8, 16, 32):
    made = toolchain.import_(folder / "relu.onnx", calibrate=dataset, dataset=dataset, time_steps=time_steps)
    print(
        f"T {time_steps}: {made.measured.relu_accuracy:.1%} of the ReLU network, {made.measured.sim_accuracy:.1%} of the spiking one in integers"
    )

# few time steps, a feedback connection whose weights are 0, and an epoch of SPIDE, which trains it with the rest
made = toolchain.import_(folder / "relu.onnx", calibrate=dataset, dataset=dataset, time_steps=8, feedback=True, output=folder / "start")
print(made.to_text())
toolchain.train(folder / "start", epochs=2, settings={"train.lr": 0.002, "train.held_out": 0}, output=folder / "tuned", device="cpu")
print(toolchain.deploy(folder / "tuned", target="sim", dataset=dataset).to_text())
