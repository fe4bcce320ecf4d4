"""`python -m mfmjt.cli`."""

from mfmjt.cli import main

main()
