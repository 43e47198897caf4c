"""What lies on disk: the adapter checkpoint."""
