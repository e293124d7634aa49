"""SAM 3 (Segment Anything with Concepts) in JAX and Flax, tuned for TPUs."""
