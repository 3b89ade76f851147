"""Train the small codec that ships inside the package.

    python examples/train_default.py --train train/manifest.json --valid valid/manifest.json --out runs/default

Manifests are NeMo's: JSON lines with `audio_filepath` (relative to the manifest) and `duration`. The run saves its
whole state every few minutes and continues from it when the command is given again; `--device cuda` uses a GPU.
Discriminators join at step `--adversarial-from`, when the spectra are roughly right.
Convolutions are trained by Muon (torch 2.9 or newer): AdamW took twice the steps (docs/MODEL_CARD.md).
Each evaluation appends a line to OUT/curve.jsonl; `--export FILE` writes the averaged weights as a `.nemo` and stops.
"""

import argparse
import copy
import json
import logging
import os
import time
from pathlib import Path

import numpy as np
import torch
from pystoi import stoi
from torch import nn

from nemo_lfr.audio import AudioReader
from nemo_lfr.checkpoint import read_checkpoint, split_weight_norm, write_checkpoint
from nemo_lfr.codec.decoder import HiFiGANDecoder
from nemo_lfr.codec.encoder import HiFiGANEncoder
from nemo_lfr.codec.quantizer import GroupFiniteScalarQuantizer
from nemo_lfr.manifests import read_manifest as read_recordings
from nemo_lfr.training.discriminators import (
    Discriminator,
    MultiPeriodDiscriminator,
    MultiResolutionDiscriminatorSTFT,
    frozen,
)
from nemo_lfr.training.initialize import initialize_from_data
from nemo_lfr.training.losses import (
    ReconstructionLoss,
    discriminator_squared,
    feature_matching,
    generator_squared,
    spread,
)
from nemo_lfr.training.spectra import Spectra

SAMPLE_RATE = 22050
SAMPLES_PER_FRAME = 1024
RESOLUTIONS = [(window, window // 4, window) for window in (128, 256, 512, 1024, 2048)]
MEL_DIMS = (20, 40, 80, 80, 160)
LOSS_WEIGHTS = {"stft": 5.0, "mel_l1": 2.0, "log_mel": 1.0, "spread": 2.0, "gen": 0.25, "feature": 0.5}
TERMS = ("stft", "mel_l1", "log_mel")


class Generator(nn.Module):
    """Encoder, FSQ and decoder without weight norm: it doubles the cost of small convolutions on a CPU."""

    def __init__(self, encoder_channels: int, decoder_channels: int) -> None:
        super().__init__()
        self.audio_encoder = HiFiGANEncoder(
            32, (2, 2, 4, 8, 8), encoder_channels, resblock_dilation_sizes=(1,), weight_norm=False
        )
        self.vector_quantizer = GroupFiniteScalarQuantizer(8, (8, 7, 6, 6))
        self.audio_decoder = HiFiGANDecoder(32, (8, 8, 4, 2, 2), decoder_channels, weight_norm=False)

    def forward(self, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Audio [B, T * samples_per_frame] -> reconstruction, encoded [B, D, T], tokens [C, B, T]."""
        encoded = self.audio_encoder.encode_frames(audio).float()
        codes, tokens = self.vector_quantizer(encoded)
        return self.audio_decoder.decode_frames(codes).float(), encoded, tokens


class Optimizers:
    """Muon for weights of convolutions, flattened behind their first dimension; AdamW at a third of its rate else."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        self.weights = [weight for weight in parameters if weight.dim() == 3 and min(weight.shape[:2]) > 1]
        # In the same memory: Muon takes nothing but matrices.
        self.matrices = [weight.detach().view(len(weight), -1) for weight in self.weights]
        chosen = {id(weight) for weight in self.weights}
        others = [parameter for parameter in parameters if id(parameter) not in chosen]
        self.muon = torch.optim.Muon(self.matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        self.adam = torch.optim.AdamW(others, lr=lr / 3, betas=(0.8, 0.99), weight_decay=1e-3)

    def step(self, lr: float) -> None:
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        set_rate(self.muon, lr)
        self.muon.step()
        set_rate(self.adam, lr / 3)
        self.adam.step()

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class Adversary:
    """Discriminators narrower than the released codec's, and their optimiser."""

    def __init__(self, lr: float, device: str) -> None:
        resolutions = [(window, window // 4, window) for window in (512, 1024, 2048)]
        periods = MultiPeriodDiscriminator(channels=8)
        self.module = Discriminator([MultiResolutionDiscriminatorSTFT(resolutions), periods]).to(device)
        self.device = device
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=lr, betas=(0.8, 0.99), weight_decay=1e-3)

    def step(self, real: Spectra, gen: Spectra, lr: float) -> dict[str, torch.Tensor]:
        """One update of the discriminators; returns the generator's terms."""
        set_rate(self.optimizer, lr)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            with torch.no_grad():
                views_real = self.module.views(real)
            views_gen = self.module.views(gen)
            scores_real, _ = self.module.judge(views_real)
            scores_gen, _ = self.module.judge([view.detach() for view in views_gen])
            loss = discriminator_squared(scores_real, scores_gen)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            with frozen(self.module):
                with torch.no_grad():
                    _, maps_real = self.module.judge(views_real)
                scores_gen, maps_gen = self.module.judge(views_gen)
            return {
                "gen": generator_squared(scores_gen),
                "feature": feature_matching(maps_real, maps_gen),
                "discriminator": loss.detach(),
            }


def read_manifest(path: Path) -> list[np.ndarray]:
    """Every utterance of a manifest as int16 samples."""
    clips = []
    for recording in read_recordings(path, path.parent, path.name):
        with AudioReader(recording.path, SAMPLE_RATE) as reader:
            audio = np.concatenate(list(reader.blocks()))
        clips.append((audio.clip(-1, 1) * 32767).round().astype(np.int16))
    return clips


def draw_batch(clips: list[np.ndarray], weights: np.ndarray, size: int, length: int, rng: np.random.Generator):
    """Random segments at random levels, [B, T_audio]; a clip is drawn in proportion to its duration."""
    batch = np.zeros((size, length), dtype=np.float32)
    for row, index in zip(batch, rng.choice(len(clips), size, p=weights), strict=True):
        clip = clips[index]
        start = rng.integers(max(1, len(clip) - length + 1))
        segment = clip[start : start + length].astype(np.float32) / 32768
        gain = 10 ** (rng.uniform(-12, 6) / 20)
        row[: len(segment)] = segment * min(gain, 0.98 / max(1e-4, np.abs(segment).max()))
    return torch.from_numpy(batch)


@torch.no_grad()
def evaluate(model: Generator, clips: list[np.ndarray], loss: ReconstructionLoss, device: str) -> dict[str, float]:
    """Mean ESTOI and spectral distances over whole clips, in fp32."""
    sums: dict[str, float] = {}
    for clip in clips:
        frames = -(-len(clip) // SAMPLES_PER_FRAME)
        audio = torch.zeros(1, frames * SAMPLES_PER_FRAME)
        audio[0, : len(clip)] = torch.from_numpy(clip.astype(np.float32) / 32768)
        audio = audio.to(device)
        output, _, _ = model(audio)
        scores = {name: value.item() for name, value in loss(Spectra(audio), Spectra(output), None, TERMS).items()}
        scores["estoi"] = stoi(audio[0].cpu().numpy(), output[0].cpu().numpy(), SAMPLE_RATE, extended=True)
        for name, value in scores.items():
            sums[name] = sums.get(name, 0.0) + value / len(clips)
    return sums


def write_aside(path: Path, write) -> None:
    """Call `write(temporary path)` and rename the result, so that a crash leaves the old file whole."""
    aside = path.with_name(path.name + ".tmp")
    write(aside)
    os.replace(aside, path)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Falls to a thirtieth over the steps without discriminators, and again over those with them."""
    if step < args.adversarial_from:
        progress = step / min(args.adversarial_from, args.steps)
        return args.lr * min(1.0, (step + 1) / 100) * (1 - 0.97 * progress)
    progress = (step - args.adversarial_from) / (args.steps - args.adversarial_from)
    return args.adversarial_lr * (1 - 0.97 * progress)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="manifest of the training speech")
    parser.add_argument("--valid", type=Path, help="manifest of the held-out speech")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--adversarial-from", type=int, default=12_500, help="step at which discriminators join")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--frames", type=int, default=24, help="length of a segment")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--adversarial-lr", type=float, default=2e-4, help="of both sides, once there are two")
    parser.add_argument("--init", type=Path, help="start with the weights of this .nemo of the same sizes")
    parser.add_argument("--encoder-channels", type=int, default=12)
    parser.add_argument("--decoder-channels", type=int, default=192)
    parser.add_argument("--eval-every", type=int, default=500, help="steps between evaluations")
    parser.add_argument("--eval-clips", type=int, default=45)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=Path, help="write the averaged weights of OUT as this .nemo and stop")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not args.export and not hasattr(torch.optim, "Muon"):
        raise SystemExit(f"torch {torch.__version__} has no Muon; install 2.9 or newer.")
    args.out.mkdir(parents=True, exist_ok=True)
    state_path = args.out / "state.pt"
    torch.manual_seed(args.seed)

    state = torch.load(state_path, map_location="cpu", weights_only=True) if state_path.exists() else None
    encoder_channels, decoder_channels = state["channels"] if state else (args.encoder_channels, args.decoder_channels)
    model = Generator(encoder_channels, decoder_channels)
    if args.export:
        if state is None:
            raise SystemExit(f"{state_path} does not exist; train first.")
        model.load_state_dict(state["average"])
        export(model, args.export)
        return

    clips, valid = read_manifest(args.train), read_manifest(args.valid)[: args.eval_clips]
    durations = np.array([len(clip) for clip in clips], dtype=np.float64)
    weights = durations / durations.sum()
    length = args.frames * SAMPLES_PER_FRAME
    loss_fn = ReconstructionLoss(SAMPLE_RATE, RESOLUTIONS, MEL_DIMS).to(args.device)

    if state is None and args.init:
        parts = read_checkpoint(args.init)[0]
        model.audio_encoder.load_state_dict(parts.encoder.state_dict())
        model.audio_decoder.load_state_dict(parts.decoder.state_dict())
    elif state is None:
        first = draw_batch(clips, weights, 32, length, np.random.default_rng(args.seed))
        initialize_from_data(model.audio_encoder, model.vector_quantizer, model.audio_decoder, first)
    model.to(args.device)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = Optimizers(list(model.parameters()), args.lr)
    adversary, step = None, 0
    if state is not None:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        if state.get("discriminator"):
            adversary = Adversary(args.adversarial_lr, args.device)
            adversary.module.load_state_dict(state["discriminator"])
            adversary.optimizer.load_state_dict(state["discriminator_optimizer"])
        logging.info("continuing from step %d", step)

    def save() -> None:
        write_aside(
            state_path,
            lambda path: torch.save(
                {
                    "step": step,
                    "channels": [encoder_channels, decoder_channels],
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "discriminator": adversary and adversary.module.state_dict(),
                    "discriminator_optimizer": adversary and adversary.optimizer.state_dict(),
                },
                path,
            ),
        )

    started, seconds = time.monotonic(), 0.0
    while step < args.steps:
        begin = time.monotonic()
        # A step's batch depends on the seed and the step alone, so a continued run sees the same data.
        batch = draw_batch(clips, weights, args.batch_size, length, np.random.default_rng([args.seed, step]))
        batch = batch.to(args.device)
        if step >= args.adversarial_from and adversary is None:
            adversary = Adversary(args.adversarial_lr, args.device)
        lr = learning_rate(step, args)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            output, encoded, tokens = model(batch)
        real, gen = Spectra(batch), Spectra(output)
        terms = loss_fn(real, gen, None, TERMS) | {"spread": spread(encoded)}
        if adversary is not None:
            terms |= adversary.step(real, gen, lr)
        total = sum(LOSS_WEIGHTS.get(name, 0) * term for name, term in terms.items())
        model.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        if torch.isfinite(norm):
            optimizer.step(lr)
        step += 1
        decay = min(0.999, step / (step + 50))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        seconds += time.monotonic() - begin
        if step % 50 == 0:
            losses = " ".join(f"{name} {term.item():.3f}" for name, term in terms.items())
            used = [codebook.unique().numel() for codebook in tokens]
            logging.info("step %d  %s  grad %.2f  tokens per codebook %d-%d  %.2f s/step",
                         step, losses, norm, min(used), max(used), seconds / 50)  # fmt: skip
            seconds = 0.0
        if step % 100 == 0 or step == args.steps:
            save()
        if step % args.eval_every == 0 or step == args.steps:
            scores = evaluate(average, valid, loss_fn, args.device)
            line = {"step": step, "minutes": round((time.monotonic() - started) / 60, 1)} | scores
            with open(args.out / "curve.jsonl", "a") as curve:
                curve.write(json.dumps(line) + "\n")
            logging.info("valid %s", line)


def export(model: Generator, path: Path) -> None:
    """Write fp16 weights as a `.nemo` that NeMo 3.0 opens too."""
    state = {
        f"{name}.{key}": value.half() if value.is_floating_point() else value
        for name, part in model.named_children()
        for key, value in split_weight_norm(part).items()
    }
    for key, value in state.items():
        if not value.isfinite().all():
            raise SystemExit(f"{key} does not fit into fp16; train longer, or with another --seed.")
    config = {
        "sample_rate": SAMPLE_RATE,
        "samples_per_frame": SAMPLES_PER_FRAME,
        "audio_encoder": {
            "_target_": "nemo_lfr.codec.encoder.HiFiGANEncoder",
            "encoded_dim": 32,
            "down_sample_rates": [2, 2, 4, 8, 8],
            "base_channels": model.audio_encoder.pre_conv.conv.out_channels,
            "resblock_dilation_sizes": [1],
            "activation": "lrelu",
        },
        "vector_quantizer": {
            "_target_": "nemo_lfr.codec.quantizer.GroupFiniteScalarQuantizer",
            "num_groups": 8,
            "num_levels_per_group": [8, 7, 6, 6],
        },
        "audio_decoder": {
            "_target_": "nemo_lfr.codec.decoder.HiFiGANDecoder",
            "input_dim": 32,
            "up_sample_rates": [8, 8, 4, 2, 2],
            "base_channels": model.audio_decoder.pre_conv.conv.out_channels,
            "activation": "lrelu",
            "output_activation": "tanh",
        },
        # NeMo's constructor wants losses even for inference; these are the released config's.
        "discriminator": None,
        "generator_loss": {"_target_": "nemo.collections.tts.losses.audio_codec_loss.GeneratorSquaredLoss"},
        "discriminator_loss": {"_target_": "nemo.collections.tts.losses.audio_codec_loss.DiscriminatorSquaredLoss"},
        "loss_resolutions": [[512, 128, 512], [1024, 256, 1024], [2048, 512, 2048]],
        "mel_loss_dims": [80, 160, 320],
        "commit_loss_scale": 0.0,
    }
    write_checkpoint(path, config, state)


if __name__ == "__main__":
    main()
