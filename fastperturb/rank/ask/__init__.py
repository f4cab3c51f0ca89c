"""Ask a model for log-probs of futures after histories."""
