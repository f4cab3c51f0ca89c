"""What training and perturbation do to a model's logit rank, and how well combinations write."""
