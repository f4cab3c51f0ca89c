"""What happens inside one call of a wrapped model: embeddings, samples, trunk, loss."""
