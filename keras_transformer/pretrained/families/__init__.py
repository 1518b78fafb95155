"""The families of checkpoints, one file each: configuration to model, names to weights."""
