"""Study: DFedSAM and MGS against DFedAvg over graphs, at alpha 0.1: accuracy and consensus; resumes."""
