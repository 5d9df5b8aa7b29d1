"""What a fit computes with: formats, costs, models, candidates and bounds."""
