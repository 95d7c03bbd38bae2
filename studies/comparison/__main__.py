"""``python -m studies.comparison``."""

from fedprompt.programs import program
from studies.comparison.program import main

if __name__ == "__main__":
    program(main)
