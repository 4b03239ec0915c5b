"""Networks made of a network: at stride 1, averaged over flips and turns, padded to legal sizes."""
