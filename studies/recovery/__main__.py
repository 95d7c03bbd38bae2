"""``python -m studies.recovery``."""

from fedprompt.programs import program
from studies.recovery.program import main

if __name__ == "__main__":
    program(main)
