"""Study: do prompts beat none? their start, block, number, rate and image size on validation; resumes."""
