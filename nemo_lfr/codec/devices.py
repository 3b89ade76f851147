"""Choose the PyTorch device."""

from typing import TYPE_CHECKING

from nemo_lfr.errors import NemoLfrError, shorten

if TYPE_CHECKING:
    import torch


def choose_device(device: "str | int | torch.device | None") -> "torch.device":
    """Return the requested device; for None or "auto", a GPU if there is one, else the CPU.

    Raises:
        NemoLfrError: if the device is unknown or not available.
    """
    import torch

    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        raise NemoLfrError(f"device is {shorten(repr(device))}; use a name such as 'cpu' or 'cuda:0', or omit it.")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # the rest of torch's message lists its backends
        raise NemoLfrError(
            f"device {shorten(device)!r} cannot be used here ({reason}); use 'cpu', or omit the device."
        ) from error
    if chosen.type == "meta":
        raise NemoLfrError("device 'meta' stores no values, so a codec cannot run on it; use 'cpu' or 'cuda'.")
    return chosen
