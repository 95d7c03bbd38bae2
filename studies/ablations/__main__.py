"""``python -m studies.ablations``."""

from fedprompt.programs import program
from studies.ablations.program import main

if __name__ == "__main__":
    program(main)
