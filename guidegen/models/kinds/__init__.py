"""Kinds of checkpoint, one module each; `guidegen.models.checkpoint` finds them by themselves."""
