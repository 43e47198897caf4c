"""What lies on disk: checkpoints of adapters, PEFT folders, and the folders of models."""
