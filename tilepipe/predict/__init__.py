"""A network on a device: preparing it, running a block's tiles, joining their scores."""
