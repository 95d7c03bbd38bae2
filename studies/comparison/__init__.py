"""Study: all methods on the same clients, data and budget, with one search of rates; resumes."""
