"""What travels to the Hub with a checkpoint: config, model, tokenizer, processor, catalogue, constrained generation."""
