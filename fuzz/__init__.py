"""A fuzz campaign over everything that reads a file of somebody else's. `python -m fuzz --help`; it needs the dev dependencies and is not installed.

target.py     what a fuzz target is
mutate.py     mutations of bytes, JSON, YAML and safetensors files
judge.py      whether what a reader did with an input is fine
worker.py     the process that reads: bounds of memory and time, and what it tells the campaign
guided.py     coverage-guided inputs by atheris, where that is installed
table.py      every target by name; a new one is a function in one of the files below and a line there
artefacts.py  .fsnn files
runs.py       checkpoints, run folders, configurations, settings
data.py       data sets: IDX, events, CIFAR, pictures
exchange.py   NIR and ONNX
"""
