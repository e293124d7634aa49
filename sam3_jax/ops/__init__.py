"""Pure functions that the modules stand on."""
