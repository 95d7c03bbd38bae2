"""Everything of a run that imports Ray."""
