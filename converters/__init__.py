"""Converts checkpoints of other programs to sam3-jax, and exports to their layouts.

`convert` (conversion.py) runs these steps:
- `sources` finds and opens the files, through `readers/`;
- `selection` finds the model among the tensors, `wrappers` removes the prefixes of training
  programs, and `identify` names files that cannot be converted;
- `plan_source` plans: it chooses a table of `layouts/` and a configuration (`infer` infers
  one from the shapes), merges LoRA (`adapters`), takes absent parts from a sam3-jax checkpoint
  (`base`), and matches every tensor with the table (`plan`);
- `vocabulary` builds the tokenizer, `provenance` records the files, and `verify_hf` compares the
  result with transformers.

`export` writes the layouts of Meta and Hugging Face, through `writers/`. `rules`, `transforms` and
`table` are the language of the tables.
"""

from .conversion import convert

__all__ = ["convert"]
