"""What a network asks of its input: legal sizes, alignment, reach. Plain integers, no torch."""
