"""From a label map to polygons: regions and their corners row by row, rings, simplification, sieving, writing."""
