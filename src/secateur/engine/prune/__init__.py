"""A run that prunes: layer by layer, group by group."""
