"""One call of a wrapped model, from inputs to loss, and the parts that it is made of."""
