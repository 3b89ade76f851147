"""Base class for codecs that transformers implements."""

import math
import os
import time
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np

from nemo_lfr.errors import NemoLfrError, install_command, shorten
from nemo_lfr.evaluation.codecs.base import ComparedCodec, RoundTrip, fit, parse_number, resample_to
from nemo_lfr.io.locate import looks_local
from nemo_lfr.io.shortage import missing_extra


class TransformersCodec(ComparedCodec):
    """Base class for codecs that transformers implements. The weights must be available locally.

    Attributes:
        class_name: name of the model class in transformers.
        hub_id: Hub id of the default weights, which are used if the options name no others.
        unit: unit of the setting, "kbit/s" or "codebooks".

    Args:
        options: SETTING, SETTING:FOLDER or SETTING:HUB_ID. The setting is a bit rate in kbit/s or a number of
            codebooks.
        device: PyTorch device; chosen automatically if None.
    """

    class_name: ClassVar[str]
    hub_id: ClassVar[str]
    unit: ClassVar[str] = "codebooks"

    def __init__(self, options: str = "", device: str | None = None) -> None:
        try:
            import transformers
        except Exception as error:  # a broken installation can raise anything
            message = f"--codec {self.kind} needs transformers: {install_command('transformers')}"
            raise missing_extra(error, "transformers", message) from error
        from nemo_lfr.codec.devices import choose_device

        setting, _, source = options.partition(":")
        self.setting = parse_number(setting, self.kind, 0.1, 1000, self.unit)
        self.device = choose_device(device)
        try:
            model_class = getattr(transformers, self.class_name)
            model = model_class.from_pretrained(source or self.hub_id, local_files_only=True)
        except (OSError, ValueError) as error:
            is_folder = os.path.isdir(source)
            if is_folder or looks_local(source):
                reason = shorten(str(error) or type(error).__name__, 200) if is_folder else "no such folder"
                raise NemoLfrError(
                    f"{self.kind}: transformers cannot load a model from {source} ({reason}); pass a folder with a "
                    "complete copy."
                ) from error
            raise NemoLfrError(
                f"{self.kind}: no weights of {source or self.hub_id} in the Hub cache; download them first: "
                f"hf download {source or self.hub_id}"
            ) from error
        self.model = model.eval().to(self.device)
        self.rate = int(model.config.sampling_rate)
        self.levels = (int(model.config.codebook_size),)
        self.name = f"{self.class_name.removesuffix('Model')} {setting} {self.unit}"
        self.identity = f"{source or self.hub_id} {getattr(model.config, '_commit_hash', None)}"
        self._check_setting(setting)

    def _check_setting(self, setting: str) -> None:
        """Raise NemoLfrError if the model does not support the setting."""

    @abstractmethod
    def _encode(self, audio: Any) -> tuple[Any, dict[str, Any]]:
        """Encode audio [1, 1, T].

        Returns:
            Token ids, whose last axis is time, and the keyword arguments for the model's method `decode`.
        """

    def round_trip(self, audio: np.ndarray, rate: int) -> RoundTrip:
        """Encode and decode audio [T] with the transformers model."""
        import torch

        at_rate = torch.from_numpy(resample_to(audio, rate, self.rate))[None, None].to(self.device)
        started = time.perf_counter()
        with torch.no_grad():
            codes, arguments = self._encode(at_rate)
            tokens = codes.reshape(-1, codes.shape[-1]).cpu().numpy()
            encoded = time.perf_counter()
            output = self.model.decode(**arguments).audio_values.reshape(-1).cpu().numpy()
        decoded = time.perf_counter()
        size = tokens.size * math.log2(self.levels[0]) / 8
        output = fit(resample_to(output, self.rate, rate), len(audio))
        return RoundTrip(output, size, size, encoded - started, decoded - encoded, tokens)
