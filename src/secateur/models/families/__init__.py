"""Model families, one small declarative file each; found by the registry `families`."""
