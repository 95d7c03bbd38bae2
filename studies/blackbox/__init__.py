"""Study: Fed-BBPT's accuracy over queries against its baselines: zero-shot, local, centralized, white box."""
