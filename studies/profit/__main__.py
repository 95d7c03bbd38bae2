"""``python -m studies.profit``."""

from fedprompt.programs import program
from studies.profit.program import main

if __name__ == "__main__":
    program(main)
