"""The extended logit matrix and its spectrum."""
