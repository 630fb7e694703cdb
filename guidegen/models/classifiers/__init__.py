"""Kinds of classifier."""
