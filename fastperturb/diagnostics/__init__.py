"""Scores, gradient noise and standard errors of a wrapped model."""
