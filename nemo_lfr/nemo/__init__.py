"""The NeMo integration: the only part of the package that imports NeMo."""
