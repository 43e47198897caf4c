"""Several adapters as one, and one adapter as another."""
