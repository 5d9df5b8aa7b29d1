"""Model families, one small declarative file each; found by `secateur.models.architecture.families`."""
