"""Train the bundled codec. The same command resumes a run that was stopped.

    python -m recipes.bundled_codec.train train=speech/train.json valid=speech/valid.json out=runs/bundled

The settings are documented in `bundled.yaml`, and each of them can be overridden with KEY=VALUE. The folder OUT
contains the files `state.pt` (saved every few minutes and at the end), `settings.yaml` and `curve.jsonl` (one line per
evaluation). A resumed run makes the same updates as a run without interruption, except with a time limit or another
precision.
"""

import argparse
import contextlib
import copy
import json
import logging
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from nemo_lfr.io.atomic import sweep
from nemo_lfr.io.exclusive import exclusive
from nemo_lfr.io.journal import write_text
from nemo_lfr.io.locate import expand_home
from nemo_lfr.training.discriminators import build_discriminator
from nemo_lfr.training.endings import ending_in_one_line
from recipes.bundled_codec.data import SpeechSegments, read_speech
from recipes.bundled_codec.discriminators import Adversary
from recipes.bundled_codec.evaluate import Evaluator, means, spread_evenly
from recipes.bundled_codec.losses import ReconstructionTerms
from recipes.bundled_codec.model import SAMPLE_RATE, Generator, num_parameters
from recipes.bundled_codec.precision import compute_dtype
from recipes.bundled_codec.settings import DEFAULT_CONFIG, Settings, read_settings
from recipes.bundled_codec.start import transform_start_
from recipes.bundled_codec.states import import_trial, load_state, read_generator, save_state
from recipes.bundled_codec.trainer import Trainer

AVERAGE_START = 50  # after n updates, the decay of the average is n / (n + 50), but at most average_decay

log = logging.getLogger(__name__)


class Run:
    """Training run, whose files are in the folder `settings.out`.

    Args:
        settings: settings of the run.
        utterances: training speech, with one array of int16 samples [T_audio] per utterance.
        clips: held-out speech for evaluation, with one array of int16 samples [T_audio] per clip.
        state: state from which to resume, as returned by `Run.state`; None to start a new run.

    Raises:
        ConfigError: if a custom loss, metric or discriminator cannot be built.
        ValueError: if the initial weights belong to another network, or the precision is unknown.
    """

    def __init__(
        self,
        settings: Settings,
        utterances: list[np.ndarray],
        clips: list[np.ndarray],
        state: dict[str, Any] | None = None,
    ) -> None:
        self.settings, self.out = settings, Path(settings.out)
        self.device = torch.device(settings.device)
        for section in settings.discriminators.custom:
            build_discriminator(section)  # find errors now, not when the discriminators are added
        torch.manual_seed(settings.seed)
        generator = Generator(settings.network)
        length = settings.segment_frames * generator.samples_per_frame
        segments = SpeechSegments(utterances, length, self.device, settings.augment)
        if state is None:
            self._initialize(generator, segments)
        else:
            generator.load_state_dict(state["generator"])
        self.generator = generator.to(self.device)
        terms = ReconstructionTerms(settings.losses).to(self.device)
        self.dtype = compute_dtype(settings.precision, self.device)
        self.trainer = Trainer(self.generator, segments, terms, settings.batch_size, self.dtype)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        length = round(settings.evaluate_seconds * SAMPLE_RATE)
        self.evaluator = Evaluator([clip[:length] for clip in clips], settings.metrics)
        self.step, self.seconds = 0, 0.0  # number of completed updates, and their total duration
        if state is not None:
            if state["trainer"]["adversary"] is not None:
                self.trainer.add_adversary(Adversary(settings.discriminators, self.device, self.dtype))
            self.average.load_state_dict(state["average"])
            self.trainer.load_state_dict(state["trainer"])
            self.step, self.seconds = state["step"], state["seconds"]
        self._trim_curve()
        log.info(
            "%.2f M parameters, %.2f hours of speech, computing in %s",
            num_parameters([generator]) / 1e6, segments.hours, str(self.dtype).removeprefix("torch."),
        )  # fmt: skip

    def _initialize(self, generator: Generator, segments: SpeechSegments) -> None:
        if self.settings.init is not None:
            path = Path(self.settings.init)
            other, network, _ = read_generator(path)
            if network != self.settings.network:
                raise ValueError(f"{path} has another network: {network}; change network in the settings.")
            generator.load_state_dict(other.state_dict())
            return
        batch = segments.batch(self.settings.start_segments, [self.settings.seed, 1]).cpu()
        log.info("initialized the network as a filter bank, SNR %.2f dB", transform_start_(generator, batch))

    def _trim_curve(self) -> None:
        """Remove lines of `curve.jsonl` after the last saved update, since these evaluations will be repeated."""
        path = self.out / "curve.jsonl"
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            write_text(path, "".join(kept))

    @property
    def progress(self) -> float:
        """Return the completed fraction of the run, in updates or in time, whichever is larger."""
        by_time = self.seconds / 60 / self.settings.minutes if self.settings.minutes else 0.0
        return max(self.step / self.settings.updates, by_time)

    def learning_rate(self) -> float:
        """Return the learning rate of the generator for the next update."""
        settings = self.settings
        rate = settings.lr * min(1.0, (self.step + 1) / settings.warmup_updates)
        rate *= 1 - (1 - settings.final_lr) * self.progress
        adversary = self.trainer.adversary
        return rate * settings.discriminators.generator_rate if adversary and adversary.is_heard else rate

    def update(self) -> dict[str, torch.Tensor]:
        """Make one update and return its loss terms."""
        began = time.monotonic()
        first = self.settings.discriminators.from_update
        if first is not None and self.step >= first and self.trainer.adversary is None:
            torch.manual_seed(self.settings.seed)  # so that a resumed run starts with the same discriminators
            self.trainer.add_adversary(Adversary(self.settings.discriminators, self.device, self.dtype))
        terms = self.trainer.step(self.learning_rate(), [self.settings.seed, self.step])
        self.step += 1
        decay = min(self.settings.average_decay, self.step / (self.step + AVERAGE_START))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.generator.parameters()), 1 - decay)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # so that the time of this update includes queued kernels
        self.seconds += time.monotonic() - began
        return terms

    def state(self) -> dict[str, Any]:
        """Return the state from which a run can be resumed exactly, as Python values and tensors."""
        return {
            "settings": self.settings.as_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "generator": self.generator.state_dict(),
            "average": self.average.state_dict(),
            "trainer": self.trainer.state_dict(),
        }

    def save(self) -> None:
        """Write the state and the settings to files."""
        save_state(self.out / "state.pt", self.state())
        text = OmegaConf.to_yaml(OmegaConf.create(self.settings.as_dict()))
        write_text(self.out / "settings.yaml", text)

    def evaluate(self, extra: dict[str, Any]) -> None:
        """Evaluate the averaged weights, and append the metrics as one line to `curve.jsonl`.

        Args:
            extra: other values to write into the line.
        """
        scores = means(self.evaluator.measure(self.average))
        line = {"step": self.step, "minutes": round(self.seconds / 60, 2)} | extra
        # JSON has no NaN.
        line |= {name: round(value, 4) if math.isfinite(value) else None for name, value in scores.items()}
        with open(self.out / "curve.jsonl", "a") as curve:
            curve.write(json.dumps(line) + "\n")
        log.info("valid %s", line)

    def train(self) -> None:
        """Train until the run is complete, with periodic saves and evaluations.

        On SIGTERM, the run saves its state and stops.
        """
        settings, stopped = self.settings, False

        def stop(*_: object) -> None:
            nonlocal stopped
            stopped = True

        if self.progress >= 1:
            log.info("the run is complete at update %d; to continue, increase `updates` or `minutes`", self.step)
        previous = signal.signal(signal.SIGTERM, stop)
        saved, logged = time.monotonic(), (self.step, self.seconds)
        counted = (self.step, self.seconds)
        sums: dict[str, torch.Tensor] = {}  # sums of the loss terms since the last evaluation
        try:
            while self.progress < 1 and not stopped:
                terms = self.update()
                for name, term in terms.items():
                    if term.dim() == 0:
                        sums[name] = sums.get(name, 0.0) + term.detach().clone()
                if self.step % settings.log_updates == 0:
                    self._log(terms, (self.seconds - logged[1]) / (self.step - logged[0]))
                    logged = (self.step, self.seconds)
                due, over = self.step % settings.evaluate_updates == 0, self.progress >= 1
                if over or time.monotonic() - saved > 60 * settings.save_minutes:
                    self.save()
                    saved = time.monotonic()
                if due or over:
                    number = self.step - counted[0]
                    parts = self.trainer.stopwatch.pop()
                    self.evaluate(
                        {
                            "seconds_per_update": round((self.seconds - counted[1]) / number, 4),
                            "parts": {name: round(value / number, 4) for name, value in parts.items()},
                            "training": {name: round(total.item() / number, 4) for name, total in sums.items()},
                        }
                    )
                    counted, sums = (self.step, self.seconds), {}
        finally:
            signal.signal(signal.SIGTERM, previous)
        if stopped:
            self.save()
            log.info("stopped at update %d; run the same command again to resume", self.step)

    def _log(self, terms: dict[str, torch.Tensor], seconds_per_update: float) -> None:
        used = [codebook.unique().numel() for codebook in terms["tokens"]]
        values = " ".join(f"{name} {term.item():.3f}" for name, term in terms.items() if term.dim() == 0)
        log.info(
            "update %d  %s  different tokens per codebook %d to %d  %.3f s/update",
            self.step, values, min(used), max(used), seconds_per_update,
        )  # fmt: skip


def _read_state(settings: Settings, imported: Path | None) -> dict[str, Any] | None:
    """Return the state from which to resume, or None for a new run.

    Args:
        settings: settings of the run.
        imported: value of --import-state, if it was passed.

    Raises:
        ValueError: if a state cannot be read or has another network, or if --import-state was passed although the
            folder of the run contains a state.
    """
    path = Path(settings.out) / "state.pt"
    if path.exists():
        if imported is not None:
            raise ValueError(
                f"{path} already exists; remove --import-state to resume, or set `out` to a different folder."
            )
        state = load_state(path)
        theirs, ours = state["settings"], settings.as_dict()
        if theirs["network"] != ours["network"]:
            raise ValueError(
                f"{path} has another network; set `out` to a different folder, or restore `network` in the settings."
            )
        for key in ours:
            if theirs.get(key) != ours[key]:
                log.warning("%s is %s, but was %s when the state was saved", key, ours[key], theirs.get(key))
        log.info("resuming from update %d", state["step"])
        return state
    if imported is None:
        return None
    state, differences = import_trial(imported, settings.as_dict())
    for line in differences:
        log.warning("%s", line)
    log.info("imported %s at update %d", imported, state["step"])
    return state


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that override the file")
    parser.add_argument(
        "--config", type=expand_home, default=DEFAULT_CONFIG, help="YAML file of settings (default %(default)s)"
    )
    parser.add_argument(
        "--import-state", type=expand_home, metavar="FILE", help="continue from this state.pt of the older script"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with contextlib.ExitStack() as locks:
        try:
            settings = read_settings(args.config, args.overrides)
            Path(settings.out).mkdir(parents=True, exist_ok=True)
            locks.enter_context(exclusive(Path(settings.out)))
            sweep(Path(settings.out), ("state.pt", "settings.yaml", "curve.jsonl"))
            if settings.threads:
                torch.set_num_threads(settings.threads)
            torch.backends.cudnn.benchmark = True
            state = _read_state(settings, args.import_state)
            audio_dir = Path(settings.audio_dir) if settings.audio_dir else None
            log.info("reading %s", ", ".join(settings.train))
            utterances = [clip for path in settings.train for clip in read_speech(Path(path), audio_dir)]
            clips = spread_evenly(read_speech(Path(settings.valid), audio_dir), settings.evaluate_clips)
            for name, found in ((", ".join(settings.train), utterances), (settings.valid, clips)):
                if not found:
                    raise ValueError(f"{name}: no usable recordings; write manifests with `nemo-lfr prepare`.")
            run = Run(settings, utterances, clips, state)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        with ending_in_one_line(settings.out):
            run.train()


if __name__ == "__main__":
    main()
