"""General helpers, independent of the model: console, paths, atomic files, validation."""
