"""NeMo integration.

`LFRCodecModel` is a drop-in replacement for NeMo's `AudioCodecModel`. The function `accelerate` converts a loaded
`AudioCodecModel` in place.
"""
