"""STFTs of a batch of audio, cached because losses and discriminators share them."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F


@lru_cache(maxsize=64)
def hann(length: int, device: torch.device) -> torch.Tensor:
    """Return a symmetric Hann window [length]. Windows are cached by length and device."""
    with torch.inference_mode(False):  # a window cached during validation must also work with autograd
        return torch.hann_window(length, periodic=False, device=device)


class Spectra:
    """Short-time spectra of a batch of audio. Spectra are computed in fp32, and cached.

    A resolution is a tuple (n_fft, hop, window) in samples. Frames are centered, and the audio is padded by reflection
    at both ends.

    Args:
        audio: samples, shape [B, T_audio].
    """

    def __init__(self, audio: torch.Tensor) -> None:
        self.audio = audio
        self._stfts: dict[tuple[int, ...], torch.Tensor] = {}
        self._magnitudes: dict[tuple[int, ...], torch.Tensor] = {}

    def stft(self, resolution: Sequence[int]) -> torch.Tensor:
        """Return the complex STFT, shape [B, bins, frames]."""
        key = tuple(resolution)
        if key not in self._stfts:
            self._stfts[key] = self._transform(self.audio, key, center=True)
        return self._stfts[key]

    def magnitude(self, resolution: Sequence[int]) -> torch.Tensor:
        """Return the magnitude sqrt(|STFT|^2 + 1e-5), shape [B, bins, frames].

        As in NeMo, the constant keeps the gradient finite for silence.
        """
        key = tuple(resolution)
        if key not in self._magnitudes:
            self._magnitudes[key] = _magnitude(self.stft(key))
        return self._magnitudes[key]

    def mel(self, resolution: Sequence[int], filters: torch.Tensor) -> torch.Tensor:
        """Compute mel magnitudes.

        As in NeMo's mel loss, the signal is padded with zeros. The cached STFT is padded by reflection, so it is
        reused only for frames that do not overlap the padding.

        Args:
            resolution: (n_fft, hop, window) in samples.
            filters: mel filter bank, shape [num_mels, bins].

        Returns:
            Mel magnitudes, shape [B, num_mels, frames].
        """
        with torch.autocast(self.audio.device.type, enabled=False):
            return self._mel(tuple(resolution), filters)

    def _mel(self, key: tuple[int, ...], filters: torch.Tensor) -> torch.Tensor:
        n_fft, hop, _ = key
        half, samples = n_fft // 2, self.audio.shape[-1]
        count = samples // hop + 1
        first, last = -(-half // hop), (samples - half) // hop + 1  # frames [first, last) do not overlap the padding
        if last <= first:
            padded = F.pad(self.audio, (half, half))
            return filters @ _magnitude(self._transform(padded, key, center=False))
        left = F.pad(self.audio[:, : (first - 1) * hop + half], (half, 0))
        right = F.pad(self.audio[:, last * hop - half :], (0, (count - 1) * hop + half - samples))
        edges = [
            filters @ _magnitude(self._transform(edge, key, center=False)) if frames else None
            for edge, frames in ((left, first), (right, count - last))
        ]
        middle = filters @ self.magnitude(key)[..., first:last]
        return torch.cat([part for part in (edges[0], middle, edges[1]) if part is not None], dim=-1)

    @staticmethod
    def _transform(audio: torch.Tensor, key: tuple[int, ...], center: bool) -> torch.Tensor:
        n_fft, hop, window = key
        with torch.autocast(audio.device.type, enabled=False):
            return torch.stft(
                audio.float(), n_fft, hop, window, hann(window, audio.device), center=center, return_complex=True
            )


def _magnitude(stft: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(torch.view_as_real(stft).square().sum(-1) + 1e-5)
