"""Local rules: what a client does with a gradient, or with losses alone."""
