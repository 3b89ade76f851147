"""Base class of the mixins that make up `LFRCodecModel`.

The mixins import NeMo's classes from this module. If NeMo is missing or broken, importing this module raises
MissingExtraError with a one-line message.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf, SCMode

from nemo_lfr.codec.codec import Codec
from nemo_lfr.errors import NEMO_PACKAGES, MissingExtraError, install_command
from nemo_lfr.signal.codebooks import CodebookUse
from nemo_lfr.training.audio_discriminator import AudioDiscriminator
from nemo_lfr.training.average import Average, WeightRecord
from nemo_lfr.training.components import AudioTerms
from nemo_lfr.training.losses import CodecLosses

if TYPE_CHECKING:
    from typing_extensions import Self

try:
    import wrapt
    from lightning.pytorch import Trainer
    from nemo.collections.common.callbacks import EMA
    from nemo.collections.tts.models.audio_codec import AudioCodecModel as NeMoAudioCodecModel
    from nemo.collections.tts.modules import audio_codec_modules
    from nemo.core.classes import common
    from nemo.core.classes.common import PretrainedModelInfo
    from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
    from nemo.utils import logging, model_utils
    from nemo.utils.app_state import AppState

    from nemo_lfr.nemo import artifacts, cuts, resume  # noqa: F401  fails early if NeMo is broken
    from nemo_lfr.nemo import neural_types as nemo_interface  # noqa: F401  assigns neural types to our modules
except Exception as error:  # importing NeMo can raise any exception
    raise MissingExtraError(
        f"the NeMo integration needs NeMo, which cannot be imported ({error}): {install_command(*NEMO_PACKAGES)}. "
        "Encoding and decoding do not need NeMo: use nemo_lfr.load()."
    ) from error

__all__ = [
    "DISCRIMINATOR",
    "EMA",
    "PROXIES",
    "WAVLM",
    "AppState",
    "BaseModel",
    "NeMoAudioCodecModel",
    "PretrainedModelInfo",
    "SaveRestoreConnector",
    "Trainer",
    "audio_codec_modules",
    "common",
    "logging",
    "model_utils",
]

DISCRIMINATOR = "discriminator."
# State-dict keys of WavLM's weights contain this text. NeMo 3.0 saves these frozen, public weights (380 MB) by
# mistake.
WAVLM = ".slm_model.ssl_model."
# Classes of the proxies that NeMo puts around `training_step` in each instance. In wrapt 2 they are not `ObjectProxy`.
PROXIES = (wrapt.FunctionWrapper, wrapt.BoundFunctionWrapper)


class BaseModel(NeMoAudioCodecModel):
    """Base class of the mixins: NeMo's model and the attributes that this package adds."""

    training: bool
    discriminator: AudioDiscriminator | None
    _codec: tuple[tuple[Any, ...], Codec[torch.Tensor]] | None = None  # values it was built from, and the codec itself
    _unbuilt_discriminator: dict[str, torch.Tensor]
    _losses: CodecLosses | None
    _metrics: AudioTerms | None
    _average: Average | None
    _codebook_use: CodebookUse | None  # accumulated during a validation epoch
    _step_began: float = 0.0  # time in seconds; not set by Lightning's tuners, which run steps without callbacks
    _accumulated: tuple[int, int] | None = None  # epoch and number of the update to which the gradients belong
    _random_weights: WeightRecord | None  # of the random initial weights, until weights are loaded
    _restored_from: Path | None
    _restored_log_config: DictConfig | None = None  # the `log_config` that `restore_from` read
    _is_frozen: bool = False  # whether the last call was `freeze` or `requires_grad_(False)`
    _is_without_gan: bool = False  # whether a caller has set the discriminator to None
    _resumed: dict[str, Any] | None = None  # checkpoint of the run to resume, until training starts

    def init_codec_state(self, *, is_random: bool, discriminator: dict[str, torch.Tensor] | None = None) -> None:
        """Initialize the attributes that NeMo's model does not have.

        Args:
            is_random: whether the weights are random.
            discriminator: discriminator weights by state-dict key, kept until training builds the discriminators.
        """
        self._unbuilt_discriminator = discriminator or {}
        self._losses = None
        self._metrics = None
        self._average = None
        self._codebook_use = None
        self._random_weights = WeightRecord(self.audio_encoder, self.audio_decoder) if is_random else None
        self._restored_from = None
        self._is_without_gan = False

    @property
    def cfg(self) -> DictConfig:
        """Model config."""
        return self._cfg

    @cfg.setter
    def cfg(self, cfg: DictConfig) -> None:
        """Replace the config, as NeMo's setter does, but allow a value that is not set (`???`)."""
        self._cfg = cfg
        self._set_hparams(OmegaConf.create({"cfg": cfg}))
        self._hparams_initial["cfg"] = OmegaConf.to_container(
            cfg, resolve=True, structured_config_mode=SCMode.INSTANTIATE
        )

    def freeze(self) -> None:
        """Freeze all weights, including those of discriminators that are not built yet."""
        super().freeze()
        self._is_frozen = True

    def unfreeze(self) -> None:
        """Unfreeze all weights."""
        super().unfreeze()
        self._is_frozen = False

    def requires_grad_(self, requires_grad: bool = True) -> "Self":
        """Set whether the weights are trained, including those of discriminators that are not built yet."""
        super().requires_grad_(requires_grad)
        self._is_frozen = not requires_grad
        return self

    @property
    def _is_random(self) -> bool:
        """Whether the encoder and the decoder still have their random initial weights."""
        weights = self._random_weights
        return weights is not None and weights.describes(self.audio_encoder, self.audio_decoder)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. As in NeMo, `discriminator = None` turns off adversarial training."""
        super().__setattr__(name, value)
        if name == "discriminator":
            self._is_without_gan = value is None
