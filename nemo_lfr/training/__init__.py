"""Training of codecs: data, discriminators, losses and initialization."""
