"""Kinds of checkpoint."""
