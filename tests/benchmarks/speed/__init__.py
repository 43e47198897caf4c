"""Speed, beside PEFT, plain references of other libraries, the floor and full fine-tuning."""
