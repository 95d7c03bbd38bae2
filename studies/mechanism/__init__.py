"""Study: PFPT's server step taken apart, on the prompt sets of a real federation."""
