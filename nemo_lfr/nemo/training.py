"""Training and validation steps of `LFRCodecModel`. The weight updates equal NeMo's, but take less time."""

import functools
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from omegaconf import OmegaConf

from nemo_lfr.checkpoint import PARTS, load_parts
from nemo_lfr.errors import ConfigError
from nemo_lfr.nemo.artifacts import SpectrogramGenerator, lists_missing_manifests
from nemo_lfr.nemo.base import DISCRIMINATOR, WAVLM
from nemo_lfr.nemo.callback import CodecCallback, FirstCallback
from nemo_lfr.nemo.config import (
    check_fit,
    check_gradients,
    check_precision,
    check_segments,
    check_training,
    unset_keys_named,
)
from nemo_lfr.nemo.inference import Inference
from nemo_lfr.nemo.loaders import DataLoaders
from nemo_lfr.nemo.patches import is_replaced
from nemo_lfr.nemo.process_means import mean_over_processes
from nemo_lfr.nemo.resume import WholeCheckpoints
from nemo_lfr.nemo.run_lock import RunLock
from nemo_lfr.nemo.stock_steps import StockSteps
from nemo_lfr.signal.codebooks import CodebookUse
from nemo_lfr.signal.spectra import Spectra
from nemo_lfr.training.audio_discriminator import AudioDiscriminator, Views, preprocess_audio, score_views
from nemo_lfr.training.components import AudioTerms
from nemo_lfr.training.discriminators import build_discriminator, frozen
from nemo_lfr.training.initialize import draw_segments, initialize_from_data
from nemo_lfr.training.slm_discriminator import SLMDiscriminator

logger = logging.getLogger(__name__)

# Names of built-in validation results, logged as `val_NAME`. The config's `metrics` may not use them.
_VALIDATED = ("loss", "perplexity", "levels_used")


class TrainingSteps(DataLoaders, StockSteps):
    """Lightning hooks for training and validation.

    `prepare("fit")` builds the discriminators when training starts, so restoring a model requires neither WavLM nor
    network access. Until then, the model keeps their weights in memory, and saved models contain these weights.
    """

    @property
    def trainer(self) -> Any:
        """Lightning's trainer, or None. Setting it adds `CodecCallback` and `FirstCallback` to the trainer."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        # Lightning sets this attribute before it loads a checkpoint and before it calls any hook, and no subclass
        # overrides it.
        LightningModule.trainer.fset(self, trainer)
        callbacks = [] if trainer is None else trainer.callbacks
        if not any(isinstance(callback, CodecCallback) for callback in callbacks):
            saving = (index for index, callback in enumerate(callbacks) if isinstance(callback, Checkpoint))
            callbacks.insert(next(saving, len(callbacks)), CodecCallback())
            callbacks.insert(0, FirstCallback())

    def setup(self, stage: str | None = None) -> None:
        """Run NeMo's `setup`, and also `prepare` if the model has no trainer."""
        super().setup(stage)
        if self._trainer is None:
            self.prepare(stage or "fit")

    def prepare(self, stage: str) -> None:
        """Check the trainer's precision and, if `stage` is "fit", prepare training.

        Preparation builds the discriminators, losses and metrics, and makes Lightning write checkpoints atomically.

        Raises:
            ConfigError: if the trainer's precision would round the weights or, for training, if the config is invalid.
        """
        check_precision(self._trainer)
        if stage == "fit":
            for key in ("mmd_loss", "mmd_time_loss"):
                if self.cfg.get(key):
                    raise ConfigError(
                        f"{key} is set; nemo_lfr does not train with it. Use NeMo's own AudioCodecModel."
                    )
            check_training(self.cfg, getattr(self.vector_quantizer, "num_codebooks", 1))
            self.build_discriminator()
            # Build losses and metrics before loading a checkpoint, which may contain tensors of custom losses.
            _ = self.losses, self.metrics
            check_segments(self.cfg, self._min_samples)
            if self._trainer is not None and type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
                self.trainer.strategy.checkpoint_io = WholeCheckpoints()

    @property
    def _min_samples(self) -> int:
        """Length, in samples, of the shortest audio that the losses and the discriminators can use."""
        least = self.losses.reconstruction.min_samples
        discriminator = self.discriminator  # a caller may have replaced it with NeMo's
        return max(least, discriminator.min_samples) if isinstance(discriminator, AudioDiscriminator) else least

    def build_discriminator(self) -> None:
        """Build the discriminators in the config, and load their weights if the restored checkpoint contains them.

        Lightning's `fit` calls this method. WavLM is loaded at the first training step that uses it. No discriminator
        is built if a caller has set `discriminator` to None.

        Raises:
            ConfigError: if the config names an unknown discriminator, or one that cannot be built.
        """
        if not hasattr(self, "discriminator"):  # callers may have deleted it to free memory
            self.register_module("discriminator", None)
        if self.discriminator is not None or self._is_without_gan or not self.cfg.get("discriminator"):
            return
        config = OmegaConf.to_container(self.cfg.discriminator, resolve=True)
        self.discriminator = build_discriminator(cast(dict[str, Any], config)).to(self.device)
        if self._is_frozen:
            self.discriminator.requires_grad_(False)
        if self._restored_from is not None:
            for module in self.discriminator.modules():
                if isinstance(module, SLMDiscriminator):
                    module.slm.fallback = functools.partial(_wavlm_weights, self._restored_from)
        self._load_kept_discriminator()

    def configure_optimizers(self) -> Any:
        """Build the optimizers. A model without a trainer is first prepared for training."""
        if self._trainer is None:
            self.prepare("fit")
        return super().configure_optimizers()

    @property
    def metrics(self) -> AudioTerms:
        """Validation metrics that the config names, built on first access.

        Raises:
            ConfigError: if a metric cannot be built.
        """
        if self._metrics is None:
            section = self.cfg.get("metrics")
            config = None if section is None else OmegaConf.to_container(section, resolve=True)
            with torch.inference_mode(False):
                self._metrics = AudioTerms(cast(Any, config), "metrics", reserved=_VALIDATED).to(self.device)
        return self._metrics

    def configure_callbacks(self) -> list[Callback]:
        """Return `RunLock` and NeMo's logging callback for training; no callbacks otherwise.

        The logging callback also logs spectrograms if `log_config.log_spectrograms` is set in the config.

        Raises:
            ConfigError: if the trainer is set to accumulate or clip gradients, and the model optimizes manually.
        """
        if self._trainer is not None and self._trainer.state.fn != TrainerFn.FITTING:
            return []
        if self._trainer is not None and not self.automatic_optimization:  # a subclass may turn it on
            check_gradients(self._trainer)  # before Lightning, whose own message does not name the model's options
        if (
            self.log_config
            and self.log_config is self._restored_log_config
            and lists_missing_manifests(self.log_config)
        ):
            logger.warning(
                "no clips are decoded during the training, because log_config in %s lists manifests that do not exist "
                "here; to decode clips, change model.log_config before the training.",
                self._restored_from,
            )
            return [RunLock()]
        with unset_keys_named():
            callbacks: list[Callback] = super().configure_callbacks()
        if callbacks and self.log_config.get("log_spectrograms"):
            callbacks[0].generators.append(SpectrogramGenerator())
        return [RunLock(), *callbacks]

    def begin_fit(self) -> None:
        """Check that the trainer can train the model, and set the modules of a restored model to training mode.

        Frozen modules stay in evaluation mode.

        Raises:
            ConfigError: if the trainer's strategy or callbacks cannot train the model; see `check_fit`. Also if the
                optimizers differ from those of the run to resume.
        """
        self.check_resumed()
        if self._restored_from is not None and not self.training:
            # `restore_from` returns a model in evaluation mode, and Lightning does not change this mode.
            self.training = True
            for part in (getattr(self, name) for name in PARTS):
                weights = list(part.parameters())
                part.train(not weights or any(weight.requires_grad for weight in weights))
        check_fit(self.trainer, has_discriminator=self.discriminator is not None)
        if self.cfg.get("ema_decay") and isinstance(self.trainer.strategy.launcher, _MultiProcessingLauncher):
            logger.warning(
                "trainer.strategy trains in other processes, which return only the trained weights to this program. "
                "The averaged weights (ema_decay) are in the .ckpt files."
            )

    def begin_training(self) -> None:
        """Initialize random weights from data, compile modules and start the moving average.

        Each of these steps runs only if the config asks for it (`initialize_from_data`, `compile`, `ema_decay`).
        """
        self.use_trained_weights()
        # Only rank 0, which loads the weights for all processes, knows whether weights were loaded.
        if self.cfg.get("initialize_from_data") and self.trainer.strategy.broadcast(self._is_random):
            self.initialize_from_data()
        self._random_weights = None
        self._accumulated = None
        self._step_began = time.perf_counter()
        if compiler := self.cfg.get("compile"):
            for part in (self.audio_encoder, self.audio_decoder):
                part.compile(backend="inductor" if compiler is True else compiler)
        if self.cfg.get("ema_decay"):
            self.start_average()

    def initialize_from_data(self, num_segments: int = 32) -> None:
        """Rescale the random weights of the encoder and decoder, using a batch of training speech.

        All processes then get the weights of rank 0. See `nemo_lfr.training.initialize`.

        Args:
            num_segments: minimum number of segments. Batches are drawn until they contain this many, or none is left.
        """
        # A script may pass its own loader to `fit`.
        loader = self._train_dl if self._train_dl is not None else self.trainer.train_dataloader
        least = max(self.audio_encoder.min_frames, self.audio_decoder.min_frames)
        batch = draw_segments(loader, num_segments, self.samples_per_frame, least)
        initialize_from_data(self.audio_encoder, self.vector_quantizer, self.audio_decoder, batch.to(self.device))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for parameter in self._generator.parameters():
                torch.distributed.broadcast(parameter.data, 0)
        logger.info("weights rescaled using %d segments of the training speech", len(batch))

    def reconstruct(
        self, batch: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode and decode a batch, with gradients.

        Args:
            batch: `audio` [B, T_audio] and `audio_lens` [B].

        Returns:
            Audio padded to complete frames [B, T_audio], the lengths of the audio in samples [B], the reconstruction
            [B, T_audio], the encoder output [B, D, T_encoded] and the tokens [B, C, T_encoded].
        """
        audio, audio_len = self.pad_audio(
            audio=batch["audio"], audio_len=batch["audio_lens"], samples_per_frame=self.samples_per_frame
        )
        # NeMo passes the sample rate, which a method of a subclass may require.
        options = {"sample_rate": self.output_sample_rate} if is_replaced(self, "encode_audio", Inference) else {}
        encoded, encoded_len = self.encode_audio(audio=audio, audio_len=audio_len, **options)
        noisy = encoded if self.encoder_noise is None else self.encoder_noise(encoded)
        codes, tokens = self.vector_quantizer(inputs=noisy, input_len=encoded_len)
        if self.training and (rate := self.cfg.get("codebook_dropout_rate")):
            codes = self.vector_quantizer.dropout_random_codebooks(codes, float(rate))
        audio_gen, _ = self.audio_decoder(inputs=codes, input_len=encoded_len)
        return audio, audio_len, audio_gen, encoded, tokens.transpose(0, 1)

    def on_validation_model_zero_grad(self) -> None:
        """Clear gradients before validation, unless gradients are being accumulated."""
        if self._batches_per_update == 1:
            super().on_validation_model_zero_grad()

    def training_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> None:
        """Update the discriminators and then the generator, which consists of the encoder and the decoder.

        As in NeMo, the discriminators are skipped in some steps. If a caller has changed the losses, NeMo's own step
        runs instead; see `StockSteps`.

        If the model config sets `accumulate_grad_batches`, each update uses the gradients of that many batches, or of
        fewer at the end of an epoch. If a subclass skips the last batch of an update, the update does not take place.

        Args:
            batch: `audio` [B, T_audio] and `audio_lens` [B].
            batch_idx: index of the batch in its epoch.
        """
        if self.find_changes():
            super().training_step(batch, batch_idx)
            return
        every = self._batches_per_update
        group = self.current_epoch, batch_idx // every
        first = batch_idx % every == 0 or group != self._accumulated  # a subclass may skip batches
        self._accumulated = group
        last = (batch_idx + 1) % every == 0 or self.trainer.is_last_batch
        optim_gen, *others = [self.optimizers()] if self.discriminator is None else self.optimizers()
        audio, audio_len, audio_gen, encoded, _ = self.reconstruct(batch)
        real, gen = (Spectra(_pad_to(signal, self._min_samples)) for signal in (audio, audio_gen))
        metrics = {
            "global_step": self.global_step,
            "lr": optim_gen.param_groups[0]["lr"],
            "batch_duration": batch["audio_lens"].sum() / self.sample_rate,
        }
        if self.discriminator is not None:
            with torch.no_grad():
                views_real = preprocess_audio(self.discriminator, real)
            views_gen = preprocess_audio(self.discriminator, gen)
            if self.should_update_disc(batch_idx // every):
                loss = self.discriminator_loss(views_real, [view.detach() for view in views_gen])
                metrics["d_loss"] = loss.detach()
                if first:
                    others[0].zero_grad()
                self.manual_backward(loss / every)
                if last:
                    self._step_optimizer(others[0], self.disc_params, name="discriminator")
        self.losses.set_weights(self.loss_scales())
        terms = self.losses.terms(real, gen, audio_len, encoded)
        if self.discriminator is not None:
            with frozen(self.discriminator):
                with torch.no_grad():
                    _, maps_real = score_views(self.discriminator, views_real)
                scores_gen, maps_gen = score_views(self.discriminator, views_gen)
            terms |= self.losses.adversarial_terms(scores_gen, maps_real, maps_gen)
        if first:
            optim_gen.zero_grad()
        self.manual_backward(self.losses.total(terms) / every)
        if last:
            self._step_optimizer(optim_gen, self.gen_params, name="generator")
            self.update_lr()
        metrics |= {f"g_loss_{name}": value.detach() for name, value in terms.items()}
        now = time.perf_counter()
        metrics["samples_per_second"] = audio.numel() / (now - self._step_began)
        self._step_began = now
        metrics = mean_over_processes(metrics, self.trainer, self.device)
        self.log_dict(metrics, on_step=True)
        if "mel_l1" in terms:
            self.log("t_loss", metrics["g_loss_mel_l1"], prog_bar=True, logger=False)

    def discriminator_loss(self, views_real: Views, views_gen: Views) -> torch.Tensor:
        """Return the discriminators' loss.

        Args:
            views_real: discriminator inputs computed from real audio, one tensor [B, ...] per network.
            views_gen: discriminator inputs computed from generated audio, with the shapes of `views_real`.

        Returns:
            A scalar.
        """
        assert self.discriminator is not None
        scores, _ = score_views(
            self.discriminator, [torch.cat(pair) for pair in zip(views_real, views_gen, strict=True)]
        )
        halves = [score.chunk(2) for score in scores]
        return self.losses.discriminator([real for real, _ in halves], [gen for _, gen in halves])

    def validation_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> None:
        """Log NeMo's validation losses, and the custom losses and metrics in the config.

        Args:
            batch: `audio` [B, T_audio] and `audio_lens` [B].
            batch_idx: index of the batch; not used.
        """
        if self.find_changes():
            super().validation_step(batch, batch_idx)
            return
        audio, audio_len, audio_gen, _, tokens = self.reconstruct(batch)
        if self._codebook_use is None:
            self._codebook_use = CodebookUse(self.vector_quantizer.num_codebooks, self.vector_quantizer.levels)
        self._codebook_use.update(tokens, audio_len // self.samples_per_frame)
        names = ("mel_l1", "mel_l2", "stft", "time_domain", "si_sdr")
        least = self.losses.reconstruction.min_samples
        real, gen = (Spectra(_pad_to(signal, least)) for signal in (audio, audio_gen))
        terms = self.losses.reconstruction(real, gen, audio_len, names)
        terms |= self.losses.custom(real, gen, audio_len)
        metrics = {f"val_loss_{name}": value for name, value in terms.items()}
        metrics["val_loss"] = terms["mel_l1"] + terms["stft"] + terms["time_domain"]
        metrics |= {f"val_{name}": value for name, value in self.metrics(real, gen, audio_len).items()}
        self.log_dict(metrics, on_epoch=True, sync_dist=True, batch_size=audio.shape[0])

    def on_validation_epoch_end(self, *args: Any, **kwargs: Any) -> Any:
        """Log the codebook perplexity and the fraction of FSQ levels in use."""
        result = super().on_validation_epoch_end(*args, **kwargs)
        if (use := self._codebook_use) is not None:
            self._codebook_use = None
            counts = self.all_gather(use.counts)
            use.counts = counts.sum(dim=0) if counts.dim() > use.counts.dim() else counts
            self.log_dict({"val_perplexity": use.perplexity().mean(), "val_levels_used": use.levels_used()})
        return result


def _pad_to(audio: torch.Tensor, length: int) -> torch.Tensor:
    """Pad signals [B, T_audio] with zeros to at least `length` samples."""
    missing = length - audio.shape[-1]
    return F.pad(audio, (0, missing)) if missing > 0 else audio


def _wavlm_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the WavLM weights in a file that NeMo 3.0 saved; an empty dict if the file has none."""
    _, tensors = load_parts(path)
    names = [key for key in tensors.entries if key.startswith(DISCRIMINATOR) and WAVLM in key]
    return {key.partition(WAVLM)[2]: tensors[key] for key in names}
