"""Means over units with bootstrap intervals, and ratios to M = 8 independent samples."""
