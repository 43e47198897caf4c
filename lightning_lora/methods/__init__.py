"""What a method other than LoRA is, and what it adds to modules."""
