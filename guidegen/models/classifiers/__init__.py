"""Classifiers and image models. A kind of them is a module of `guidegen.models.classifiers.kinds`."""
