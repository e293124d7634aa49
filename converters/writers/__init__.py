"""Writers of weight files and vocabularies that need neither PyTorch nor transformers."""
