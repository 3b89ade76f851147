"""NeMo model of the codec, a drop-in replacement for NeMo's `AudioCodecModel`.

The encoder, quantizer and decoder of the model are modules of `nemo_lfr.modules`. To use the model, change one import:

    from nemo_lfr import AudioCodecModel
    model = AudioCodecModel.from_pretrained("nvidia/low-frame-rate-speech-codec-22khz")

Saved files name only NeMo's classes, so NeMo can open them without this package.
"""

import copy

from omegaconf import DictConfig, open_dict

from nemo_lfr.checkpoint import (
    NEMO_MODEL,
    PARTS,
    build_parts,
    mark_from_checkpoint,
    nemo_config,
    sections_from_checkpoint,
)
from nemo_lfr.codec.ambient import building_state
from nemo_lfr.nemo.base import Trainer
from nemo_lfr.nemo.config import (
    ANY_LOSS,
    BUILT_IN,
    IDENTITY,
    SMALLEST_QUANTIZER,
    check_trainer,
    check_training,
    checked_values,
    model_config,
    target_of,
    unset_keys_named,
)
from nemo_lfr.nemo.copies import Copies
from nemo_lfr.nemo.files import READ_PARTS, NemoFiles
from nemo_lfr.nemo.inference import Inference
from nemo_lfr.nemo.patches import warn_of_patched_modules
from nemo_lfr.nemo.state_dicts import StateDicts
from nemo_lfr.nemo.training import TrainingSteps
from nemo_lfr.training.components import import_components


class LFRCodecModel(Inference, StateDicts, NemoFiles, Copies, TrainingSteps):
    """NeMo model of the codec, a drop-in replacement for NeMo's `AudioCodecModel`.

    It supports codecs that consist of a HiFi-GAN encoder, FSQ and a HiFi-GAN decoder.

    `encode`, `decode` and `forward` compute no gradients, except while Lightning trains the model. They accept
    positional arguments, inputs on any device and audio of any length. The tokens of an utterance do not depend on the
    rest of its batch. `encode_audio`, `quantize`, `dequantize` and `decode_audio` behave as in NeMo and support
    gradients.

    Args:
        cfg: model config, whose `_target_` values may name classes of NeMo or of this package. Discriminators, losses
            and metrics may also be custom classes.
        trainer: Lightning trainer, as in NeMo.

    Raises:
        ConfigError: if the config does not describe a codec of the LFR family, or names a custom component that cannot
            be imported, or if an argument has the wrong type.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        # Read this first: sections that come from a checkpoint have a flag, which NeMo's conversion would drop.
        from_checkpoint = sections_from_checkpoint(cfg)
        cfg = model_config(cfg)
        check_trainer(trainer)
        values = checked_values(cfg)
        parts = READ_PARTS.get() or build_parts(values)
        if not self._is_model_being_restored():
            check_training(cfg, parts.quantizer.num_codebooks)
        cfg = copy.deepcopy(cfg)
        for key in cfg if self._is_model_being_restored() else from_checkpoint:
            mark_from_checkpoint(cfg._get_node(key))
        import_components(cfg, built_in=BUILT_IN)
        warn_of_patched_modules()
        with open_dict(cfg):
            cfg.target = NEMO_MODEL
            for name in PARTS:
                cfg[name] = nemo_config(values[name])
        # NeMo's constructor builds the losses, the data loaders and the modules. The modules are replaced below, so
        # the constructor gets a config with minimal modules.
        lean = copy.deepcopy(cfg)
        with open_dict(lean):
            lean.audio_encoder, lean.audio_decoder = dict(IDENTITY), dict(IDENTITY)
            lean.discriminator = None
            for key in ("generator_loss", "discriminator_loss"):
                if key in lean and target_of(lean[key]) not in BUILT_IN:  # a custom loss, which NeMo would reject
                    lean[key] = dict(ANY_LOSS)
            lean.commit_loss_scale = 0.0
            lean.vector_quantizer = dict(SMALLEST_QUANTIZER)
        with building_state(), unset_keys_named():
            super().__init__(cfg=lean, trainer=trainer)
        self.audio_encoder, self.vector_quantizer, self.audio_decoder = parts.encoder, parts.quantizer, parts.decoder
        self.init_codec_state(is_random=READ_PARTS.get() is None)
        self.cfg = cfg


AudioCodecModel = LFRCodecModel
