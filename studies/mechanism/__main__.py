"""``python -m studies.mechanism``."""

from fedprompt.programs import program
from studies.mechanism.program import main

if __name__ == "__main__":
    program(main)
