"""Training: losses and initialisation."""
