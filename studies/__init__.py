"""Scientific experiments, one folder each: program, results, figure, page."""
