"""``python -m studies.blackbox``."""

from fedprompt.programs import program
from studies.blackbox.program import main

if __name__ == "__main__":
    program(main)
