"""Study: the personalization and robustness curve: learning rates, interpolation, client optimizers; resumes."""
