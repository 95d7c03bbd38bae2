"""The folder of a run: who holds it, and what may be replaced in it."""
