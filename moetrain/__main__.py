"""`python -m moetrain`, and `torchrun -m moetrain`."""

from moetrain.cli import program

program()
