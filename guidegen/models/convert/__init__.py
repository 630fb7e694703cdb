"""Checkpoint formats of other projects. A format is a module of this package with a subclass of `Format`."""
