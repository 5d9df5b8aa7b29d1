"""`secateur sweep`: curves over methods and sparsities."""
