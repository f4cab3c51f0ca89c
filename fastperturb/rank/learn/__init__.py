"""Learn a model of low logit rank from queries."""
