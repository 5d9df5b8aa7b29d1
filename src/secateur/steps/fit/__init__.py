"""A budget in, the best model out: levels of every linear, a search among them, and the winner."""
