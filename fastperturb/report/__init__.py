"""Figures, tables and bootstrap intervals that several commands share."""
