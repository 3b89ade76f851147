"""Load NeMo's models for speech recognition and speaker verification."""

from typing import Any


def is_nemo(source: str) -> bool:
    """Return whether a text names a NeMo model: a `.nemo` file or nemo:HUB_ID."""
    return source.startswith("nemo:") or source.endswith(".nemo")


def open_nemo_model(model_class: Any, source: str, device: str) -> Any:
    """Load a NeMo model for inference.

    Args:
        model_class: class of the model.
        source: `.nemo` file, nemo:FILE or nemo:HUB_ID.
        device: PyTorch device.
    """
    name = source.removeprefix("nemo:")
    is_file = name.endswith(".nemo")
    model = model_class.restore_from(name, map_location=device) if is_file else model_class.from_pretrained(name)
    return model.eval().to(device)
