"""Figures, tables and intervals that several commands share."""
