"""The model as a library object: jitted programs, batching, sharding, mask generation."""
