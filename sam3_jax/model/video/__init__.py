"""The tracker's network: memories of earlier frames and attention to them (SAM 2, Ravi et al. 2024,
arXiv:2408.00714; released with SAM 3). The head for visual prompts decodes the masks."""
