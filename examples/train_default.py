"""Train the small codec that ships inside the package.

    python examples/train_default.py --train train/manifest.json --valid valid/manifest.json --out runs/default

Manifests are NeMo's: JSON lines with `audio_filepath` (relative to the manifest) and `duration`. A run ends after
`--steps` or `--minutes`, whichever comes first; schedules follow its progress. It saves its whole state every minute
and continues from it when the command is given again. On a GPU (`--device cuda`) the recordings lie in its memory and
an update is one CUDA graph. Discriminators join at `--adversarial-from` of the run, when the spectra are about right.
Convolutions are trained by Muon: AdamW took twice the steps (docs/MODEL_CARD.md).
Each evaluation appends a line to OUT/curve.jsonl; `--export FILE` writes the averaged weights as a `.nemo` and stops.
"""

import argparse
import copy
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from pystoi import stoi
from torch import nn
from torch.nn.utils import parametrize

from nemo_lfr.audio import AudioReader
from nemo_lfr.checkpoint import read_checkpoint, split_weight_norm, write_checkpoint
from nemo_lfr.codec.conv import channels_last
from nemo_lfr.codec.decoder import HiFiGANDecoder
from nemo_lfr.codec.encoder import HiFiGANEncoder
from nemo_lfr.codec.quantizer import GroupFiniteScalarQuantizer
from nemo_lfr.manifests import read_manifest as read_recordings
from nemo_lfr.training.discriminators import (
    Discriminator,
    MultiPeriodDiscriminator,
    MultiResolutionDiscriminatorSTFT,
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
LOSS_WEIGHTS = {"stft": 5.0, "mel_l1": 2.0, "log_mel": 1.0}
TERMS = tuple(LOSS_WEIGHTS)
SPREAD_WEIGHT = 2.0
FEATURE_WEIGHT = 12.0  # beside the score's; HiFi-GAN's 2 for the sum of six layers


class Generator(nn.Module):
    """Encoder, FSQ and decoder.

    Without weight norm, which doubles the cost of small convolutions on a CPU, and with zeros at the ends, which
    convolutions add for nothing, where reflections are copies of every layer's signal.
    """

    def __init__(self, encoder_channels: int, decoder_channels: int) -> None:
        super().__init__()
        self.audio_encoder = HiFiGANEncoder(
            32,
            (2, 2, 4, 8, 8),
            encoder_channels,
            resblock_dilation_sizes=(1,),
            pad_mode="zeros",
            weight_norm=False,
        )
        self.vector_quantizer = GroupFiniteScalarQuantizer(8, (8, 7, 6, 6))
        self.audio_decoder = HiFiGANDecoder(32, (8, 8, 4, 2, 2), decoder_channels, pad_mode="zeros", weight_norm=False)

    def forward(self, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Audio [B, T * samples_per_frame] -> reconstruction, encoded [B, D, T], tokens [C, B, T]."""
        encoded = self.audio_encoder.encode_frames(audio).float()
        codes, tokens = self.vector_quantizer(encoded)
        return self.audio_decoder.decode_frames(codes.to(audio.dtype)).float(), encoded, tokens


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """A convolution's [H_out, H_in, K] in channels-last memory as [H_out, K * H_in], in the same memory."""
    return weight.transpose(1, 2).view(weight.shape[0], -1)


class Muon:
    """Momentum whose matrices are made orthogonal (Jordan et al., 2024), at the root mean square of an AdamW update.

    `torch.optim.Muon` goes matrix by matrix, 2,000 small products a step, and cannot be recorded in a CUDA graph. Here
    matrices of one shape are one batch, and the rate is a tensor.
    """

    COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of the Newton-Schulz iteration

    def __init__(self, matrices: list[torch.Tensor], momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        self.groups: dict[tuple[int, ...], list[int]] = {}
        for index, matrix in enumerate(matrices):
            self.groups.setdefault(tuple(matrix.shape), []).append(index)
        self.matrices = matrices
        self.moments = [
            torch.zeros(len(group), *shape, device=matrices[0].device) for shape, group in self.groups.items()
        ]
        self.momentum, self.weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, grads: list[torch.Tensor], lr: torch.Tensor) -> None:
        torch._foreach_mul_(self.matrices, 1 - lr * self.weight_decay)
        for group, moment in zip(self.groups.values(), self.moments, strict=True):
            grad = torch.stack([grads[index] for index in group])
            moment.lerp_(grad, 1 - self.momentum)
            update = self._orthogonal(grad.lerp_(moment, self.momentum))
            update = update.float() * (-0.2 * max(update.shape[1:]) ** 0.5 * lr)
            torch._foreach_add_([self.matrices[index] for index in group], list(update))

    def _orthogonal(self, matrices: torch.Tensor) -> torch.Tensor:
        tall = matrices.shape[1] > matrices.shape[2]
        matrices = (matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)).bfloat16()
        matrices = matrices.mT if tall else matrices
        a, b, c = self.COEFFICIENTS
        for _ in range(5):
            gram = matrices @ matrices.mT
            matrices = torch.baddbmm(matrices, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), matrices, beta=a)
        return (matrices.mT if tall else matrices).contiguous()


def adamw(parameters: list[nn.Parameter], lr: torch.Tensor) -> torch.optim.AdamW:
    """AdamW whose rate is a tensor, so that a recorded step sees it change."""
    return torch.optim.AdamW(
        parameters, lr=lr, betas=(0.8, 0.99), weight_decay=1e-3, fused=True, capturable=lr.is_cuda
    )


class Speech:
    """Recordings in a device's memory, from which segments are cut there."""

    def __init__(self, clips: list[np.ndarray], length: int, device: torch.device) -> None:
        durations = np.array([len(clip) for clip in clips])
        padded = [np.pad(clip, (0, max(0, length - len(clip)))) for clip in clips]
        self.starts = np.cumsum([0] + [len(clip) for clip in padded[:-1]])
        self.choices = np.maximum(1, durations - length + 1)
        self.weights = durations / durations.sum()
        self.samples = torch.from_numpy(np.concatenate(padded)).to(device)
        self.window = torch.arange(length, device=device)

    def draw(self, size: int, seed: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Where random segments start and their gains, [B] each; a clip is drawn in proportion to its duration."""
        rng = np.random.default_rng(seed)
        clips = rng.choice(len(self.starts), size, p=self.weights)
        gains = 10 ** (rng.uniform(-12, 6, size) / 20)
        starts = self.starts[clips] + rng.integers(self.choices[clips])
        return torch.from_numpy(starts), torch.from_numpy(gains.astype(np.float32))

    def cut(self, starts: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        """Segments [B, T_audio] from there, not so loud as to clip."""
        audio = self.samples[starts[:, None] + self.window].float() / 32768
        peaks = audio.abs().amax(dim=1).clamp_min(1e-4)
        return audio * torch.minimum(gains, 0.98 / peaks)[:, None]


class Adversary:
    """Discriminators narrower than the released codec's, and their optimiser."""

    def __init__(self, device: torch.device) -> None:
        resolutions = [(window, window // 4, window) for window in (512, 1024, 2048)]
        spectra = MultiResolutionDiscriminatorSTFT(resolutions, pad_mode="zeros")
        self.module = Discriminator([spectra, MultiPeriodDiscriminator(channels=16, pad_mode="zeros")]).to(device)
        self.device = device
        self.lr = torch.zeros((), device=device)
        self.parameters = list(self.module.parameters())
        self.optimizer = adamw(self.parameters, self.lr)

    def step(self, real: Spectra, gen: Spectra) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """One update; the generator's terms, and their gradient at the audio, [B, T_audio].

        Both sides learn from one look at each signal, the generator not from a second one after the update.
        """
        with torch.autocast(self.device.type, dtype=torch.bfloat16), parametrize.cached():
            with torch.no_grad():
                views_real = self.module.views(real)
            views_gen = self.module.views(gen)
            inputs = [view.detach().requires_grad_() for view in views_gen]
            scores_real, maps_real = self.module.judge(views_real)
            scores_gen, maps_gen = self.module.judge(inputs)
            loss = discriminator_squared(scores_real, scores_gen)
            terms = {
                "gen": generator_squared(scores_gen),
                "feature": feature_matching([[map.detach() for map in maps] for maps in maps_real], maps_gen),
                "discriminator": loss,
            }
            total = terms["gen"] + FEATURE_WEIGHT * terms["feature"]
            gradients = torch.autograd.grad(total, inputs, retain_graph=True)
            learned = torch.autograd.grad(loss, self.parameters)
        self.lr.mul_(torch.stack(torch._foreach_norm(learned)).norm().isfinite())
        for parameter, grad in zip(self.parameters, learned, strict=True):
            parameter.grad = grad.nan_to_num()
        self.optimizer.step()
        return terms, torch.autograd.grad(views_gen, gen.audio, gradients)[0]


class Trainer:
    """One update of everything that learns; on a GPU it is recorded once and played from then on.

    What changes from step to step lies in tensors of fixed places: the segments, the rates and `share`, the size of
    the discriminators' gradient beside the spectra's, both taken at the audio. Balanced so, they need no weights tuned
    to each other (as in VQGAN, arXiv 2012.09841, and EnCodec, arXiv 2210.13438). It grows with what the discriminators
    know: at a full share from the start they undid within 50 steps what the spectra had taught (docs/MODEL_CARD.md).
    """

    def __init__(self, model: Generator, speech: Speech, batch_size: int, device: torch.device) -> None:
        self.speech, self.device = speech, device
        self.loss = ReconstructionLoss(SAMPLE_RATE, RESOLUTIONS, MEL_DIMS).to(device)
        self.adversary: Adversary | None = None
        self.lr, self.lr_other, self.share = (torch.zeros((), device=device) for _ in range(3))
        self.starts = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.gains = torch.ones(batch_size, device=device)
        # The model learns in fp32; what computes is its copy in bf16, cast once a step instead of layer by layer.
        for parameter in model.parameters():
            if parameter.dim() == 3:
                parameter.data = channels_last(parameter.detach())
        self.parameters = list(model.parameters())
        self.fast = copy.deepcopy(model).bfloat16()
        self.fast_parameters = list(self.fast.parameters())
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.is_matrix = [weight.dim() == 3 and min(weight.shape[:2]) > 1 for weight in self.parameters]
        matrices = [as_matrix(weight.detach()) for weight in self._chosen(self.parameters, True)]
        self.muon = Muon(matrices)
        self.adam = adamw(self._chosen(self.parameters, False), self.lr_other)
        self._eager, self._graph, self._terms = 0, None, {}

    def _chosen(self, values: list, matrices: bool) -> list:
        return [value for value, is_matrix in zip(values, self.is_matrix, strict=True) if is_matrix == matrices]

    def add_adversary(self) -> None:
        self.adversary = Adversary(self.device)
        self._eager, self._graph = 0, None

    def step(self, lr: float, share: float, seed: list[int]) -> dict[str, torch.Tensor]:
        """Train on the batch of this seed; returns the losses, which the next call may overwrite."""
        for place, value in zip((self.starts, self.gains), self.speech.draw(len(self.starts), seed), strict=True):
            place.copy_(value, non_blocking=True)
        self.lr.fill_(lr)
        self.lr_other.fill_(lr / 3)
        self.share.fill_(share)
        if self.adversary is not None:
            self.adversary.lr.fill_(lr)
        if self.device.type == "cpu":
            return self._update()
        if self._graph is None and self._eager < 3:  # libraries choose their ways and take their memory first
            self._eager += 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                terms = self._update()
            torch.cuda.current_stream().wait_stream(side)
            return terms
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._terms = self._update()
        self._graph.replay()
        return self._terms

    def _update(self) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            torch._foreach_copy_(self.fast_parameters, self.parameters)
        batch = self.speech.cut(self.starts, self.gains)
        output, encoded, tokens = self.fast(batch.bfloat16())
        heard = output.detach().requires_grad_()
        real, gen = Spectra(batch), Spectra(heard)
        terms = self.loss(real, gen, None, TERMS)
        total = sum(weight * terms[name] for name, weight in LOSS_WEIGHTS.items())
        (gradient,) = torch.autograd.grad(total, heard, retain_graph=self.adversary is not None)
        if self.adversary is not None:
            adversarial, other = self.adversary.step(real, gen)
            terms |= adversarial
            # A squared error of 1/4 is that of who knows nothing; what it says is noise.
            known = (1 - 4 * terms["discriminator"].detach()).clamp_min(0)
            gradient = gradient + other * (self.share * known * gradient.norm() / other.norm().clamp_min(1e-12))
        terms["spread"] = spread(encoded)
        ends = [output, SPREAD_WEIGHT * terms["spread"]]
        grads = torch.autograd.grad(ends, self.fast_parameters, [gradient, torch.ones_like(ends[1])])
        terms["grad"] = self._learn(grads)
        return {name: term.detach() for name, term in terms.items()} | {"tokens": tokens}

    @torch.no_grad()
    def _learn(self, grads: Sequence[torch.Tensor]) -> torch.Tensor:
        """Update the model; returns the gradient's norm, which is limited to 10."""
        memory = [grad.transpose(1, 2).flatten() if grad.dim() == 3 else grad for grad in grads]
        flat = torch.cat(memory).float()
        norm = flat.norm()
        finite = norm.isfinite()  # otherwise the step moves nothing
        self.lr.mul_(finite)
        self.lr_other.mul_(finite)
        flat *= torch.where(finite, (10 / (norm + 1e-6)).clamp_max(1), 0.0)
        parts = list(flat.nan_to_num_().split(self.sizes))
        shaped = [
            part.view(weight.shape[0], weight.shape[2], -1) if weight.dim() == 3 else part
            for part, weight in zip(parts, self.parameters, strict=True)
        ]
        self.muon.step([part.flatten(1) for part in self._chosen(shaped, True)], self.lr)
        others = zip(self._chosen(self.parameters, False), self._chosen(shaped, False), strict=True)
        for weight, part in others:
            weight.grad = part.transpose(1, 2) if weight.dim() == 3 else part
        self.adam.step()
        return norm

    def state_dict(self) -> dict:
        state = {"moments": self.muon.moments, "adam": self.adam.state_dict()}
        if self.adversary is not None:
            state["discriminator"] = self.adversary.module.state_dict()
            state["discriminator_adam"] = self.adversary.optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        for moment, saved in zip(self.muon.moments, state["moments"], strict=True):
            moment.copy_(saved)
        load_adamw(self.adam, state["adam"], self.lr_other)
        if "discriminator" in state:
            self.add_adversary()
            self.adversary.module.load_state_dict(state["discriminator"])
            load_adamw(self.adversary.optimizer, state["discriminator_adam"], self.adversary.lr)


def load_adamw(optimizer: torch.optim.AdamW, state: dict, lr: torch.Tensor) -> None:
    """Its moments; its rate stays the tensor that it was made with, wherever the state was made."""
    optimizer.load_state_dict(state)
    optimizer.param_groups[0]["capturable"] = lr.is_cuda
    optimizer.param_groups[0]["lr"] = lr


def read_manifest(path: Path, audio_dir: Path | None) -> list[np.ndarray]:
    """Every utterance of a manifest as int16 samples; paths are relative to `audio_dir`, else to its own folder."""

    def read(recording) -> np.ndarray:
        with AudioReader(recording.path, SAMPLE_RATE) as reader:
            audio = np.concatenate(list(reader.blocks()))
        return (audio.clip(-1, 1) * 32767).round().astype(np.int16)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(read, read_recordings(path, audio_dir or path.parent, path.name)))


@torch.no_grad()
def evaluate(
    model: Generator, clips: list[np.ndarray], loss: ReconstructionLoss, device: torch.device
) -> dict[str, float]:
    """Mean ESTOI and spectral distances over whole clips, in fp32."""
    sums: dict[str, float] = {}
    for clip in clips:
        frames = -(-len(clip) // SAMPLES_PER_FRAME)
        audio = torch.zeros(1, frames * SAMPLES_PER_FRAME)
        audio[0, : len(clip)] = torch.from_numpy(clip.astype(np.float32) / 32768)
        audio = audio.to(device)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False):  # every clip has its own length
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


def schedule(step: int, progress: float, joined: bool, args: argparse.Namespace) -> tuple[float, float]:
    """Learning rate and the discriminators' share of the gradient, at a step and a progress of 0 to 1.

    The rate falls to a tenth before the discriminators have joined, and then, from its second start, to a thirtieth.
    """
    start = args.adversarial_from
    if not joined:
        return args.lr * min(1.0, (step + 1) / 100) * (1 - 0.9 * progress / start), 0.0
    late = max(0.0, progress - start) / (1 - start) if start < 1 else 1.0
    return args.adversarial_lr * (1 - 0.97 * late), args.adversarial_share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, nargs="+", help="manifests of the training speech")
    parser.add_argument("--valid", type=Path, help="manifest of the held-out speech")
    parser.add_argument("--audio-dir", type=Path, help="of the manifests' relative paths; else each one's own folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="of training, all starts together")
    parser.add_argument("--adversarial-from", type=float, default=0.3, help="share of the run; 1 is never")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--frames", type=int, default=24, help="length of a segment")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--adversarial-lr", type=float, default=5e-4, help="of both sides, once there are two")
    parser.add_argument("--adversarial-share", type=float, default=1.0, help="of the gradient, the spectra's being 1")
    parser.add_argument("--init", type=Path, help="start with this .nemo's weights of the same sizes")
    parser.add_argument("--encoder-channels", type=int, default=16)
    parser.add_argument("--decoder-channels", type=int, default=256)
    parser.add_argument("--eval-every", type=int, default=500, help="steps between evaluations")
    parser.add_argument("--eval-clips", type=int, default=45)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=Path, help="write the averaged weights of OUT as this .nemo and stop")
    args = parser.parse_args()
    if not args.export and not (args.train and args.valid):
        parser.error("give --train and --valid, or --export")
    if not (0 <= args.adversarial_from <= 1 and args.minutes > 0):
        parser.error("--adversarial-from is a share from 0 to 1, and --minutes more than 0")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    state_path = args.out / "state.pt"
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)

    state = torch.load(state_path, map_location="cpu", weights_only=True) if state_path.exists() else None
    if state is not None and "trainer" not in state:
        raise SystemExit(f"{state_path} is of an older version of this script; train anew, in another --out.")
    encoder_channels, decoder_channels = state["channels"] if state else (args.encoder_channels, args.decoder_channels)
    model = Generator(encoder_channels, decoder_channels)
    if args.export:
        if state is None:
            raise SystemExit(f"{state_path} does not exist; train first.")
        model.load_state_dict(state["average"])
        export(model, args.export)
        return

    length = args.frames * SAMPLES_PER_FRAME
    speech = Speech([clip for path in args.train for clip in read_manifest(path, args.audio_dir)], length, device)
    valid = read_manifest(args.valid, args.audio_dir)[: args.eval_clips]
    logging.info("%.2f hours of speech", len(speech.samples) / SAMPLE_RATE / 3600)
    if state is None and args.init:
        parts = read_checkpoint(args.init)[0]
        model.audio_encoder.load_state_dict(parts.encoder.state_dict())
        model.audio_decoder.load_state_dict(parts.decoder.state_dict())
    elif state is None:
        starts, gains = speech.draw(32, [args.seed])
        first = speech.cut(starts.to(device), gains.to(device)).cpu()
        initialize_from_data(model.audio_encoder, model.vector_quantizer, model.audio_decoder, first)
    model.to(device)
    trainer = Trainer(model, speech, args.batch_size, device)
    average = copy.deepcopy(model).requires_grad_(False)
    step, seconds = 0, 0.0  # trained
    if state is not None:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        trainer.load_state_dict(state["trainer"])
        step, seconds = state["step"], state["seconds"]
        logging.info("continuing from step %d", step)

    def save() -> None:
        write_aside(
            state_path,
            lambda path: torch.save(
                {
                    "step": step,
                    "seconds": seconds,
                    "channels": [encoder_channels, decoder_channels],
                    "model": model.state_dict(),  # in fp32
                    "average": average.state_dict(),
                    "trainer": trainer.state_dict(),
                },
                path,
            ),
        )

    def is_over() -> bool:
        return step >= args.steps or seconds >= 60 * args.minutes

    saved, logged, counted = time.monotonic(), time.monotonic(), step
    while not is_over():
        begin = time.monotonic()
        progress = max(step / args.steps, seconds / 60 / args.minutes)
        if args.adversarial_from < 1 and progress >= args.adversarial_from and trainer.adversary is None:
            trainer.add_adversary()
        joined = trainer.adversary is not None
        # A step's batch depends on the seed and the step alone, so a continued run sees the same data.
        terms = trainer.step(*schedule(step, progress, joined, args), [args.seed, step])
        step += 1
        decay = min(0.999, step / (step + 50))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), trainer.parameters, 1 - decay)
        if step % 50 == 0:
            used = [codebook.unique().numel() for codebook in terms["tokens"]]
            losses = " ".join(f"{name} {term.item():.3f}" for name, term in terms.items() if term.dim() == 0)
            now = time.monotonic()
            logging.info("step %d  %s  tokens per codebook %d-%d  %.3f s/step",
                         step, losses, min(used), max(used), (now - logged) / (step - counted))  # fmt: skip
            logged, counted = now, step
        saves, evaluates = time.monotonic() - saved > 60, step % args.eval_every == 0
        if device.type == "cuda" and (saves or evaluates):
            torch.cuda.synchronize()  # what is queued belongs to the training's time
        seconds += time.monotonic() - begin
        if saves or is_over():
            save()
            saved = time.monotonic()
        if evaluates or is_over():
            scores = evaluate(average, valid, trainer.loss, device)
            line = {"step": step, "minutes": round(seconds / 60, 1)} | scores
            with open(args.out / "curve.jsonl", "a") as curve:
                curve.write(json.dumps(line) + "\n")
            logging.info("valid %s", line)
            logged, counted = time.monotonic(), step


def export(model: Generator, path: Path) -> None:
    """Write fp16 weights as a `.nemo` that NeMo 3.0 opens too."""
    state = {
        f"{name}.{key}": value.half().contiguous() if value.is_floating_point() else value
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
            "pad_mode": "zeros",
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
            "pad_mode": "zeros",
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
