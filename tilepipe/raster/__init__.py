"""Reading rasters: what they are, which bands count, how windows of them are read."""
