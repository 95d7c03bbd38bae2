"""Study: PFPT changed in one place at a time: accuracy, and what becomes of its pool; resumes."""
