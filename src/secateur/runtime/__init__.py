"""The runtime: pruned models stored without their zeros, and run without them."""
