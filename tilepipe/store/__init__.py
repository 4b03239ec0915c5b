"""The output store: its layout, what is durable and done, who may write."""
