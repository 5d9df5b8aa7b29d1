"""`secateur retrain` and `secateur distill`: a pruned model learns, its zeros held."""
