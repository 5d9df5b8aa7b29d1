"""Chooses what to prune or cut: surveys, the search, depth, channels, experts."""
