"""What a client does: local training in fused groups, update rules, evaluation."""
