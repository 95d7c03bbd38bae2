"""Options of a run: the schema, reading it, and what does not go together."""
