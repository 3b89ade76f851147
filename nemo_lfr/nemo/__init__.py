"""NeMo integration: `LFRCodecModel`, a drop-in replacement for NeMo's `AudioCodecModel`, and `accelerate`."""
