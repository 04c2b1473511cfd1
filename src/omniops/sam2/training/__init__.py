"""Training of SAM 2: losses, prompts drawn from masks, and the loss of pictures and of clips."""
