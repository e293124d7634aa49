"""What goes into the model: images read and resized, phrases tokenized, prompts checked."""
