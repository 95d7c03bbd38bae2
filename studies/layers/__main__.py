"""``python -m studies.layers``."""

from fedprompt.programs import program
from studies.layers.program import main

if __name__ == "__main__":
    program(main)
