"""Synthetic aerial scenes with their truth."""
