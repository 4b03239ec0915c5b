"""Training: data sets of rasters, random windows of them, and the loop that learns from these."""
