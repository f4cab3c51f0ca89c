"""Benchmarks of logit rank: effects of training and perturbation, writing, learning and speed."""
