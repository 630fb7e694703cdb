"""Guidance as algebra on scores: noise levels, denoisers, classifiers, and how they combine."""
