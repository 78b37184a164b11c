"""``python -m armopt``."""

from armopt.cli.app import main

main()
