"""Scores, the filter as a pure function, and the training examples of the kept trajectories."""
