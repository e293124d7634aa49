"""Model inputs: reading and resizing images, tokenizing phrases, validating prompts."""
