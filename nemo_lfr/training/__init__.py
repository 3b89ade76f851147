"""Training data, discriminators, losses and initialization."""
