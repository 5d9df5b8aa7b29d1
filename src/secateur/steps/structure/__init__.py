"""`secateur structure`: removes layers, heads, neurons, channels and experts."""
