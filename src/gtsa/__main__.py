"""python -m gtsa, e.g. under torchrun."""

from gtsa.cli.main import main

main()
