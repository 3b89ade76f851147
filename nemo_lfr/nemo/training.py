"""How `LFRCodecModel` learns: NeMo's updates in fewer steps of arithmetic."""

import functools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from nemo.collections.tts.models.audio_codec import AudioCodecModel as NeMoAudioCodecModel
from omegaconf import DictConfig, OmegaConf, open_dict
from torch.utils.data import IterableDataset

from nemo_lfr.checkpoint import load_parts
from nemo_lfr.errors import ConfigError
from nemo_lfr.nemo.artifacts import SpectrogramGenerator
from nemo_lfr.nemo.cuts import cut_loader, uses_lhotse
from nemo_lfr.nemo.resume import WholeCheckpoints
from nemo_lfr.signal.codebooks import CodebookUse
from nemo_lfr.signal.spectra import Spectra
from nemo_lfr.training.data import manifest_loader
from nemo_lfr.training.discriminators import (
    AudioDiscriminator,
    SLMDiscriminator,
    Views,
    build_discriminator,
    frozen,
)
from nemo_lfr.training.initialize import initialize_from_data
from nemo_lfr.training.losses import CodecLosses

logger = logging.getLogger(__name__)

DISCRIMINATOR = "discriminator."
# WavLM inside the SLM discriminator: frozen, public, 380 MB. NeMo 3.0 saves it by mistake; we never do.
WAVLM = ".slm_model.ssl_model."


class TrainingSteps(NeMoAudioCodecModel):
    """The hooks that Lightning calls to train and validate; `nemo_lfr.nemo.model` adds the rest.

    The discriminators are built when training starts (`setup("fit")`), not before: restoring needs neither WavLM nor
    the network. Until then their weights are carried along, so that saving loses nothing.
    """

    discriminator: AudioDiscriminator | None
    _unbuilt_discriminator: dict[str, torch.Tensor]
    _losses: CodecLosses | None
    _average: "Average | None"
    _codebook_use: CodebookUse | None  # of the validation that is under way
    _step_began: float
    _is_random: bool  # no weights have been loaded
    _restored_from: Path | None

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if stage in (None, "fit"):
            for key in ("mmd_loss", "mmd_time_loss"):
                if self.cfg.get(key):
                    raise ConfigError(
                        f"{key} is set; nemo_lfr does not train with it. Use NeMo's own AudioCodecModel."
                    )
            self.build_discriminator()
            if self._trainer is not None and type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
                self.trainer.strategy.checkpoint_io = WholeCheckpoints()

    def build_discriminator(self) -> None:
        """Build the discriminators of the config, with the weights that came with the checkpoint.

        Lightning's `fit` calls this. WavLM is loaded by the first step that looks through it.

        Raises:
            ConfigError: for a discriminator that is not of this codec family.
        """
        self.discriminator = getattr(self, "discriminator", None)  # callers delete it to free memory
        if self.discriminator is not None or not self.cfg.get("discriminator"):
            return
        config = OmegaConf.to_container(self.cfg.discriminator, resolve=True)
        self.discriminator = build_discriminator(cast(dict[str, Any], config)).to(self.device)
        if self._restored_from is not None:
            for module in self.discriminator.modules():
                if isinstance(module, SLMDiscriminator):
                    module.slm.fallback = functools.partial(_wavlm_weights, self._restored_from)
        if self._unbuilt_discriminator:
            state, self._unbuilt_discriminator = self._unbuilt_discriminator, {}
            self.load_state_dict(self.state_dict() | state)

    @property
    def losses(self) -> CodecLosses:
        """The terms of the config, built when training or validation first needs them."""
        if self._losses is None:
            config = OmegaConf.to_container(self.cfg, resolve=True)
            with torch.inference_mode(False):  # validation may be first to need it
                self._losses = CodecLosses(cast(dict[str, Any], config)).to(self.device)
        return self._losses

    @property
    def max_steps(self) -> int:
        """Steps of the learning-rate schedule; `steps_per_epoch: null` is one pass over the data, as configs say."""
        config = self._cfg
        if config.get("max_steps") is not None or not config.get("max_epochs"):
            return super().max_steps
        batches = config.get("steps_per_epoch")
        if batches is None:
            try:
                batches = len(self._train_dl)
            except TypeError as error:
                raise ConfigError(
                    "steps_per_epoch must be set: the training data has no end (Lhotse), so no epoch."
                ) from error
        return int(config.max_epochs) * -(-int(batches) // self._batches_per_update)

    def get_dataset(self, cfg: DictConfig) -> Any:
        """NeMo's loader, with our dataset in the place of its `VocoderDataset`."""
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self._trainer else (1, 0)
        return manifest_loader(cfg, world_size, rank) or super().get_dataset(cfg)

    def _get_lhotse_dataloader(self, cfg: DictConfig) -> Any:
        return cut_loader(cfg, self.sample_rate, self.global_rank, self.world_size)

    def setup_validation_data(self, cfg: DictConfig) -> None:
        """Manifests or, beyond NeMo, Lhotse cuts."""
        if uses_lhotse(cfg):
            self._validation_dl = cut_loader(cfg, self.sample_rate, self.global_rank, self.world_size, validation=True)
        else:
            super().setup_validation_data(cfg)

    def configure_optimizers(self) -> Any:
        """NeMo's; on a CPU Adam passes over each weight once ("fused"), unless the config says how it should."""
        configured = super().configure_optimizers()
        # One optimizer, several, or lists of optimizers and of schedules.
        several = configured if isinstance(configured, list | tuple) else [configured]
        for optimizer in several[0] if isinstance(several[0], list) else several:
            if isinstance(optimizer, torch.optim.Adam) and self.device.type == "cpu":
                for group in optimizer.param_groups:
                    if group["fused"] is None and not group["foreach"]:
                        group["fused"] = True
        return configured

    def configure_callbacks(self) -> list[Callback]:
        """NeMo's callback that logs clips, which with `log_config.log_spectrograms` draws them too.

        It reads the clips at once, so only to train: a file that training saved does not say where they were.
        """
        if self._trainer is not None and self._trainer.state.fn != TrainerFn.FITTING:
            return []
        callbacks = super().configure_callbacks()
        if callbacks and self.log_config.get("log_spectrograms"):
            callbacks[0].generators.append(SpectrogramGenerator())
        return callbacks

    def maybe_init_from_pretrained_checkpoint(self, cfg: DictConfig, map_location: str = "cpu") -> None:
        """NeMo's `init_from_*` keys; `init_from_ptl_ckpt`, which stock cannot read, is read as any checkpoint."""
        path = cfg.get("init_from_ptl_ckpt")
        if isinstance(path, str):
            with open_dict(cfg):
                del cfg.init_from_ptl_ckpt
                cfg.init_from_nemo_model = path
        if isinstance(path := cfg.get("init_from_nemo_model"), str):
            self._restored_from = Path(path)  # in every process, though NeMo reads it in the first one alone
        super().maybe_init_from_pretrained_checkpoint(cfg, map_location)

    def on_train_start(self) -> None:
        super().on_train_start()
        # Whether weights were loaded is known to the process that loaded them for all.
        if self.cfg.get("initialize_from_data") and self.trainer.strategy.broadcast(self._is_random):
            self.initialize_from_data()
        self._is_random = False
        self._step_began = time.perf_counter()
        if compiler := self.cfg.get("compile"):
            for part in (self.audio_encoder, self.audio_decoder):
                part.compile(backend="inductor" if compiler is True else compiler)
        if self.cfg.get("ema_decay"):
            self._average = self._average or Average(self._generator, float(self.cfg.ema_decay))

    @property
    def _generator(self) -> torch.nn.ModuleList:
        return torch.nn.ModuleList([self.audio_encoder, self.audio_decoder])

    def initialize_from_data(self, num_segments: int = 32) -> None:
        """Scale the generator's random weights by what speech makes of them; see `training.initialize`.

        Every process draws its own segments and takes the first one's weights.
        """
        audio: list[torch.Tensor] = []
        loader = self._train_dl
        batches: Iterable[Mapping[str, torch.Tensor]] = loader
        if loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset):
            # Not by the loader's iterator: with persistent workers it is the one that training goes on with.
            batches = (loader.collate_fn([loader.dataset[row] for row in rows]) for rows in loader.batch_sampler)
        for drawn in batches:
            audio += [*drawn["audio"]]
            if len(audio) >= num_segments:
                break
        frames = max(segment.shape[-1] for segment in audio) // self.samples_per_frame
        length = max(frames, self.audio_encoder.min_frames, self.audio_decoder.min_frames) * self.samples_per_frame
        batch = torch.stack([F.pad(segment, (0, max(0, length - len(segment))))[:length] for segment in audio])
        initialize_from_data(self.audio_encoder, self.vector_quantizer, self.audio_decoder, batch.to(self.device))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for parameter in self._generator.parameters():
                torch.distributed.broadcast(parameter.data, 0)
        logger.info("weights scaled by %d segments of the training speech", len(audio))

    def reconstruct(
        self, batch: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Through the codec and back, with a graph.

        Args:
            batch: `audio` [B, T_audio] and `audio_lens` [B].

        Returns:
            Audio padded to whole frames, its lengths, the reconstruction [B, T_audio], the encoder's output [B, D, T]
            and the tokens [B, C, T].
        """
        audio, audio_len = self.pad_audio(
            audio=batch["audio"], audio_len=batch["audio_lens"], samples_per_frame=self.samples_per_frame
        )
        encoded, encoded_len = self.encode_audio(audio=audio, audio_len=audio_len)
        noisy = encoded if self.encoder_noise is None else self.encoder_noise(encoded)
        codes, tokens = self.vector_quantizer(inputs=noisy, input_len=encoded_len)
        audio_gen, _ = self.audio_decoder(inputs=codes, input_len=encoded_len)
        return audio, audio_len, audio_gen, encoded, tokens.transpose(0, 1)

    @property
    def _batches_per_update(self) -> int:
        return int(self.cfg.get("accumulate_grad_batches") or 1)

    def on_validation_model_zero_grad(self) -> None:
        """Lightning's, but for batches whose gradients still wait for others of their update."""
        if self._batches_per_update == 1:
            super().on_validation_model_zero_grad()

    def training_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> None:
        """One update of the discriminators, when it is their turn, and one of the generator.

        The updates are NeMo's. Real audio is looked at once and without a graph, generated audio once; while the
        generator learns, the discriminators are frozen. With `accumulate_grad_batches` in the model's config, that
        many batches make an update.
        """
        every = self._batches_per_update
        first = batch_idx % every == 0
        last = (batch_idx + 1) % every == 0 or self.trainer.is_last_batch
        optim_gen, *others = [self.optimizers()] if self.discriminator is None else self.optimizers()
        audio, audio_len, audio_gen, encoded, _ = self.reconstruct(batch)
        real, gen = Spectra(audio), Spectra(audio_gen)
        metrics = {
            "global_step": self.global_step,
            "lr": optim_gen.param_groups[0]["lr"],
            "batch_duration": audio_len.sum() / self.sample_rate,
        }
        if self.discriminator is not None:
            with torch.no_grad():
                views_real = self.discriminator.views(real)
            views_gen = self.discriminator.views(gen)
            if self.should_update_disc(batch_idx // every):
                loss = self.discriminator_loss(views_real, [view.detach() for view in views_gen])
                metrics["d_loss"] = loss.detach()
                if first:
                    others[0].zero_grad()
                self.manual_backward(loss / every)
                if last:
                    self._step_optimizer(others[0], self.disc_params, name="discriminator")
        terms = self.losses.terms(real, gen, audio_len, encoded)
        if self.discriminator is not None:
            with frozen(self.discriminator):
                with torch.no_grad():
                    _, maps_real = self.discriminator.judge(views_real)
                scores_gen, maps_gen = self.discriminator.judge(views_gen)
            terms |= self.losses.adversarial_terms(scores_gen, maps_real, maps_gen)
        if first:
            optim_gen.zero_grad()
        self.manual_backward(self.losses.total(terms) / every)
        if last:
            self._step_optimizer(optim_gen, self.gen_params, name="generator")
            if self._average is not None:
                self._average.update(self._generator)
            self.update_lr()
        metrics |= {f"g_loss_{name}": value.detach() for name, value in terms.items()}
        now = time.perf_counter()
        metrics["samples_per_second"] = audio.numel() / (now - self._step_began)
        self._step_began = now
        self.log_dict(metrics, on_step=True)
        if "mel_l1" in terms:
            self.log("t_loss", terms["mel_l1"].detach(), prog_bar=True, logger=False)

    def discriminator_loss(self, views_real: Views, views_gen: Views) -> torch.Tensor:
        """What the discriminators minimise; both kinds of audio in one pass, so that weights are normed once."""
        assert self.discriminator is not None
        scores, _ = self.discriminator.judge([torch.cat(pair) for pair in zip(views_real, views_gen, strict=True)])
        halves = [score.chunk(2) for score in scores]
        return self.losses.discriminator([real for real, _ in halves], [gen for _, gen in halves])

    def validation_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> None:
        """NeMo's validation losses, from one STFT of each signal per resolution."""
        audio, audio_len, audio_gen, _, tokens = self.reconstruct(batch)
        if self._codebook_use is None:
            self._codebook_use = CodebookUse(self.vector_quantizer.num_codebooks, self.vector_quantizer.levels)
        self._codebook_use.update(tokens, audio_len // self.samples_per_frame)
        names = ("mel_l1", "mel_l2", "stft", "time_domain", "si_sdr")
        terms = self.losses.reconstruction(Spectra(audio), Spectra(audio_gen), audio_len, names)
        metrics = {f"val_loss_{name}": value for name, value in terms.items()}
        metrics["val_loss"] = terms["mel_l1"] + terms["stft"] + terms["time_domain"]
        self.log_dict(metrics, on_epoch=True, sync_dist=True, batch_size=audio.shape[0])

    # The running average of the weights, when the config has an `ema_decay`: validated, exported and resumed.

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the generator's weights are their running average, if there is one."""
        if self._average is None:
            yield
            return
        self._average.swap(self._generator)
        try:
            yield
        finally:
            self._average.swap(self._generator)

    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self._average is not None:
            self._average.swap(self._generator)

    def on_validation_epoch_end(self, *args: Any, **kwargs: Any) -> Any:
        # Not `on_validation_end`: checkpoints are written there, before a module's own hook.
        result = super().on_validation_epoch_end(*args, **kwargs)
        if (use := self._codebook_use) is not None:
            self._codebook_use = None
            counts = self.all_gather(use.counts)
            use.counts = counts.sum(dim=0) if counts.dim() > use.counts.dim() else counts
            self.log_dict({"val_perplexity": use.perplexity().mean(), "val_levels_used": use.levels_used()})
        if self._average is not None:
            self._average.swap(self._generator)
        return result

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._average is not None:
            checkpoint["average"] = {"count": self._average.count, "weights": self._average.weights}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "average" in checkpoint and self.cfg.get("ema_decay"):
            self._average = Average(self._generator, float(self.cfg.ema_decay))
            self._average.count = checkpoint["average"]["count"]
            self._average.weights = list(checkpoint["average"]["weights"])


class Average:
    """Exponential moving average of a module's parameters.

    Args:
        module: whose parameters to follow.
        decay: share of the old average that each update keeps; less in the first steps, which it would outweigh.
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.count = 0
        self.weights = [parameter.detach().clone() for parameter in module.parameters()]

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 50))
        self._move(module)
        torch._foreach_lerp_(self.weights, [parameter.detach() for parameter in module.parameters()], 1 - decay)

    def swap(self, module: torch.nn.Module) -> None:
        """Exchange the average and the module's own values; again, and they are back."""
        self._move(module)
        for index, parameter in enumerate(module.parameters()):
            parameter.data, self.weights[index] = self.weights[index], parameter.data

    def _move(self, module: torch.nn.Module) -> None:
        """To where the module is by now: a checkpoint is read before it goes to its GPU."""
        with torch.inference_mode(False):  # a validation may come first
            pairs = zip(self.weights, module.parameters(), strict=True)
            self.weights = [weight.to(parameter.device) for weight, parameter in pairs]


def _wavlm_weights(path: Path) -> dict[str, torch.Tensor]:
    """The WavLM inside a file that NeMo 3.0 saved, if it is there."""
    _, rest = load_parts(path, others=DISCRIMINATOR)
    return {key.partition(WAVLM)[2]: value for key, value in rest.items() if WAVLM in key}
