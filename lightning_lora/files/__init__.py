"""What is done with files of adapters and models, without a model that computes."""
