"""``python -m studies.prompts``."""

from fedprompt.programs import program
from studies.prompts.program import main

if __name__ == "__main__":
    program(main)
