"""NeMo integration: the only subpackage that imports NeMo."""
