"""python -m gtsa, e.g. under torchrun."""

from gtsa.cli import main

main()
