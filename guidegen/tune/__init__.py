"""The search for the best setting: what is varied, a model of the curve, rounds of drawing, and their study."""
