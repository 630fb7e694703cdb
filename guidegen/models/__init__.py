"""What people have: checkpoints and classifiers, opened and loaded."""
