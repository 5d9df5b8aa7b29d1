"""`secateur structure`: cuts layers, heads, neurons, channels and experts."""
