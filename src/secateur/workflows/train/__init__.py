"""`secateur retrain` and `secateur distill`: train a pruned model and keep its zeros."""
