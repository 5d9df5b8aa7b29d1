"""The pruning run: layer by layer, group by group."""
