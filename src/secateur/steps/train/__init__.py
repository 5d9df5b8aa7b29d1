"""`secateur train`: train a pruned model and keep its zeros."""
