"""How training data are divided among clients."""
