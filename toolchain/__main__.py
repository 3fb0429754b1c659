"""`python -m toolchain` is the command `toolchain`."""

from toolchain.cli import main

main()
