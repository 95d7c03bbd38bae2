"""``python -m studies.graphs``."""

from fedprompt.programs import program
from studies.graphs.program import main

if __name__ == "__main__":
    program(main)
