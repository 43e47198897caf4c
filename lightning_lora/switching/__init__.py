"""Which adapters take part."""
