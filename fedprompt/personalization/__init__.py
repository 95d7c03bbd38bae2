"""Every client tunes the global model to its own data."""
