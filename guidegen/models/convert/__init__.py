"""Formats of others that are converted."""
