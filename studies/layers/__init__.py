"""Study: prompts before block 0, 6, 8 or 10: time per step, and accuracy in a fixed time."""
