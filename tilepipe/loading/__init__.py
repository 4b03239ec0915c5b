"""Networks by name: what a reference says, the code, weights and texts that it names."""
