"""Texts: reading, tokenising, packing and ordering them."""
