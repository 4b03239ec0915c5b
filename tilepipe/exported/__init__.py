"""Exported programs (`torch.export`): archives read, and graphs run, without executing anything they hold."""
