"""Write by combinations of other histories."""
