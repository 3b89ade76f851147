"""Train a language model on tokens, and sample audio from it.

    nemo-lfr tokenize train.json --out tokens/train --format parquet
    nemo-lfr tokenize valid.json --out tokens/valid --format parquet
    python examples/train_language_model.py tokens=tokens/train valid=tokens/valid out=runs/lm

`language_model.yaml` lists all options. The output folder contains a checkpoint, `metrics.jsonl` with the loss in bits
per frame, and `sample.wav`. Ctrl-C and SIGTERM save a checkpoint. The same command then resumes the run, with the same
results as without the interruption. `torchrun --nproc-per-node N` trains on N devices.

The model is a causal transformer with the delay pattern of MusicGen. Each codebook is delayed by one frame relative to
the previous one, so a token can depend on the tokens of the previous codebooks in the same frame. The program is
small enough to read, and meant as a starting point.
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from nemo_lfr import load
from nemo_lfr.client import Client
from nemo_lfr.client.server import require_websockets
from nemo_lfr.corpus.dataset import TokenDataset, collate
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.io.atomic import naming, replacing, sweep
from nemo_lfr.io.exclusive import exclusive
from nemo_lfr.io.locate import expand_home
from nemo_lfr.io.tensor_file import save_tensors
from nemo_lfr.io.token_file import Metadata
from nemo_lfr.lm import DelayLayout
from nemo_lfr.spec import same_fingerprint

CONFIG = Path(__file__).with_name("language_model.yaml")
# Options that may change when a run is resumed
FREE = ("out", "codec", "server", "steps", "valid", "valid_every", "save_every", "sample_frames", "temperature")
SERVER_WAIT_S = 10  # maximum time to wait for a server that is starting or full
ZERO = ("seed", "weight_decay", "sample_frames")  # options that may be 0


class LanguageModel(nn.Module):
    """Causal transformer over parallel streams of ids.

    Args:
        layout: arrangement of the tokens.
        max_frames: maximum length of a clip in frames.
        width: hidden channels.
        layers: number of transformer layers.
        heads: number of attention heads.
    """

    def __init__(self, layout: DelayLayout, max_frames: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.streams, self.vocab = layout.num_streams, layout.vocab_size
        self.embedding = nn.Embedding(self.streams * self.vocab, width)
        self.position = nn.Embedding(max_frames + self.streams + 1, width)  # extra positions for the delays and EOS
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, self.streams * self.vocab)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next ids, at every step.

        Args:
            ids: shape [B, S, L], with S parallel streams (one per codebook) and L steps.

        Returns:
            Logits, shape [B, S, L, vocab].
        """
        offsets = self.vocab * torch.arange(self.streams, device=ids.device)[:, None]
        hidden = self.embedding(ids + offsets).sum(1) + self.position.weight[: ids.shape[2]]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[2], device=ids.device)
        hidden = self.layers(hidden, mask=mask, is_causal=True)
        return self.head(hidden).unflatten(2, (self.streams, self.vocab)).transpose(1, 2)


def loss_of(model: nn.Module, layout: DelayLayout, tokens: torch.Tensor, tokens_len: torch.Tensor) -> torch.Tensor:
    """Return the sum of the negative log-likelihoods of all tokens and EOS ids, in nats.

    Args:
        model: a `LanguageModel`.
        layout: arrangement of the tokens.
        tokens: shape [B, C, T].
        tokens_len: valid frames, shape [B].
    """
    ids, _ = layout.arrange(tokens, tokens_len)
    targets = ids[..., 1:]
    # The delay pattern determines these ids, so they are not part of the loss.
    is_known = (targets == layout.pad_id) | (targets == layout.bos_id)
    logits = model(ids[..., :-1])
    return F.cross_entropy(logits.flatten(0, 2), targets.masked_fill(is_known, -100).flatten(), reduction="sum")


@torch.no_grad()
def sample(
    model: LanguageModel, layout: DelayLayout, num_frames: int, temperature: float, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Sample a clip, and yield each frame as soon as the tokens of all codebooks are known.

    Args:
        model: the model.
        layout: arrangement of the tokens.
        num_frames: number of frames to sample, at most `max_frames` of the model.
        temperature: number by which the logits are divided.
        generator: source of random numbers on the CPU.

    Yields:
        Tokens of a frame, shape [C].
    """
    device, streams = model.head.weight.device, model.streams
    ids = torch.full((1, streams, 1), layout.bos_id, device=device)
    for step in range(1, num_frames + streams):
        logits = model(ids)[0, :, -1, : layout.codebook_size].float().cpu()
        drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).to(device)
        is_delayed = torch.arange(streams, device=device)[:, None] >= step
        ids = torch.cat([ids, drawn.masked_fill(is_delayed, layout.bos_id)[None]], dim=2)
        if step >= streams:  # codebook c of a frame is c steps later than codebook 0
            yield ids[0, :, -streams:].diagonal().cpu()


def speak(frames: Iterator[torch.Tensor], server: str) -> tuple[np.ndarray, int]:
    """Decode frames on a server while the model samples them.

    Args:
        frames: tokens, shape [C] each.
        server: URL of `nemo-lfr serve`.

    Returns:
        Audio, float32 [T_audio], and its sample rate in Hz. A real application would play each piece when it arrives.
    """
    pieces: list[np.ndarray] = []
    started = time.monotonic()

    def receive(audio: np.ndarray, number: int) -> None:
        if len(audio) and not any(map(len, pieces)):
            print(f"first audio after {time.monotonic() - started:.2f} s, at frame {number}", flush=True)
        pieces.append(audio)

    with Client(server, retry_s=SERVER_WAIT_S).decode_stream(ramp=(1, 2, 4)) as stream:
        for number, frame in enumerate(frames, start=1):
            receive(stream.push(frame.numpy()), number)
        receive(stream.flush(), len(pieces))
        return np.concatenate(pieces), stream.sample_rate


def check_server(url: str, codec: Metadata) -> None:
    """Check, before training starts, that a server answers and can decode the tokens.

    Args:
        url: URL of `nemo-lfr serve`.
        codec: metadata of the tokens.

    Raises:
        NemoLfrError: if the server cannot be reached or has another codec, or if the package websockets, which streams
            need, is not installed.
    """
    require_websockets()
    info = Client(url, timeout=10, retry_s=SERVER_WAIT_S).info()
    if not same_fingerprint(info.fingerprint, codec.fingerprint):
        raise NemoLfrError(
            f"{url}: the tokens were not made by the codec of this server ({info.model}); start the server with "
            "--model and the codec that made the tokens."
        )


def crop(batch: dict[str, Any], max_frames: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens and lengths of a batch. Clips longer than `max_frames` are cropped to a random excerpt."""
    tokens, lengths = batch["tokens"], batch["tokens_len"]
    starts = [int(torch.randint(max(1, int(n) - max_frames + 1), (), generator=generator)) for n in lengths]
    rows = [row[:, start : start + max_frames] for row, start in zip(tokens, starts, strict=True)]
    rows = [F.pad(row, (0, min(max_frames, tokens.shape[2]) - row.shape[1])) for row in rows]
    return torch.stack(rows), lengths.clamp(max=max_frames)


class Trainer:
    """Training run that can be interrupted and resumed.

    Args:
        config: options of `language_model.yaml`.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.out = expand_home(config.out)
        self.data = self._open(config.tokens, shuffle=True)
        self.valid = None if config.valid is None else self._open(config.valid, shuffle=False)
        codec = self.data.tokens.codec
        if self.valid is not None and self.valid.tokens.codec.fingerprint != codec.fingerprint:
            raise NemoLfrError(
                f"{config.valid}: the tokens were made by another codec than those in {config.tokens}; use one codec."
            )
        if config.server is not None and config.sample_frames and self.rank == 0:
            check_server(config.server, codec)
        self.layout = DelayLayout(codec.num_codebooks, codec.codebook_size)
        torch.manual_seed(config.seed)
        self.model = LanguageModel(self.layout, config.max_frames, **config.model).to(self.device)
        self.parallel = DistributedDataParallel(self.model) if self.world_size > 1 else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=config.weight_decay)
        self.step, self.epoch = 0, 0
        self.signal: int | None = None
        if self.checkpoint.exists():
            self._resume()
        if self.rank == 0:
            self._trim_metrics()

    @property
    def checkpoint(self) -> Path:
        """Return the path of the checkpoint."""
        return self.out / "checkpoint.pt"

    @property
    def metrics(self) -> Path:
        """Return the path of the file with the losses."""
        return self.out / "metrics.jsonl"

    def train(self) -> None:
        """Train, validate and save until the last step, or until a signal."""
        started = time.monotonic()
        for batch in itertools.islice(self._batches(), max(0, self.config.steps - self.step)):
            bits = self._update(batch)
            self.step += 1
            is_last = self.step == self.config.steps or self._is_interrupted()
            if self.step % self.config.valid_every == 0 or is_last:
                line = {"step": self.step, "train_bits_per_frame": bits}
                if self.valid is not None:
                    line["valid_bits_per_frame"] = self.validate()
                self._log(line | {"seconds": round(time.monotonic() - started, 2)})
            if self.step % self.config.save_every == 0 or is_last:
                self._save()
            if self.signal is not None:
                return

    @torch.no_grad()
    def validate(self) -> float:
        """Return the validation loss in bits per frame, over the first `max_frames` frames of each clip."""
        assert self.valid is not None
        totals = torch.zeros(2, dtype=torch.float64)
        self.valid.set_epoch(0)
        for batch in DataLoader(self.valid, self.config.batch_size, collate_fn=collate):
            tokens = batch["tokens"][..., : self.config.max_frames]
            lengths = batch["tokens_len"].clamp(max=self.config.max_frames)
            loss = loss_of(self.model, self.layout, tokens.to(self.device), lengths.to(self.device))
            totals += torch.tensor([loss.item(), lengths.sum()])
        return self._bits(totals)

    def write_sample(self) -> None:
        """Sample a clip and write it as audio."""
        config = self.config
        num_frames = min(config.sample_frames, config.max_frames)
        generator = torch.Generator().manual_seed(config.seed)
        frames = sample(self.model, self.layout, num_frames, config.temperature, generator)
        if config.server is not None:
            audio, sample_rate = speak(frames, config.server)
        else:
            codec = load(config.codec, "cpu")
            if not codec.made(self.data.tokens.codec.fingerprint):
                raise NemoLfrError(
                    f"the tokens in {config.tokens} were made by another codec than codec={config.codec}; pass the "
                    "codec that made them."
                )
            decoded, _ = codec.decode(torch.stack(list(frames), dim=1)[None])
            audio, sample_rate = decoded[0].numpy(), codec.sample_rate
        soundfile.write(self.out / "sample.wav", audio, sample_rate)
        print(f"{self.out / 'sample.wav'}: {len(audio) / sample_rate:.1f} s", flush=True)

    def stop(self, number: int, frame: Any) -> None:
        """Handle a signal: stop after the current step."""
        self.signal = number

    def _open(self, folder: str, shuffle: bool) -> TokenDataset:
        bucket = self.config.batch_size if shuffle else None
        dataset = TokenDataset(expand_home(folder), shuffle=shuffle, seed=self.config.seed, bucket_size=bucket)
        if not len(dataset):
            raise NemoLfrError(f"{folder}: no tokens in this folder; pass a folder that nemo-lfr tokenize wrote.")
        return dataset

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Yield the batches of all epochs, starting from the current position."""
        for epoch in itertools.count(self.epoch):
            self.epoch = epoch
            self.data.set_epoch(epoch)
            # Without loader workers, the dataset's state is the position after the last batch
            yield from DataLoader(self.data, self.config.batch_size, collate_fn=collate)

    def _update(self, batch: dict[str, Any]) -> float:
        """Update the model with one batch, and return the loss in bits per frame."""
        config, step = self.config, self.step + 1
        # With one generator per step, a resumed run draws the same random numbers
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) * self.world_size + self.rank)
        tokens, lengths = crop(batch, config.max_frames, generator)
        rate = config.learning_rate * min(step / config.warmup_steps, math.sqrt(config.warmup_steps / step))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(self.parallel, self.layout, tokens.to(self.device), lengths.to(self.device))
        self.optimizer.zero_grad()
        (loss / lengths.sum().to(self.device)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        self.optimizer.step()
        return self._bits(torch.tensor([loss.item(), lengths.sum()], dtype=torch.float64))

    def _bits(self, totals: torch.Tensor) -> float:
        """Sum nats and frames over all processes, and return the bits per frame."""
        return round(float(self._sum(totals)[0] / totals[1]) / math.log(2), 4)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            place = values.to(self.device)
            dist.all_reduce(place)
            values.copy_(place)
        return values

    def _is_interrupted(self) -> bool:
        """Return whether any process has received a signal. All processes then stop after the same step."""
        number = int(self._sum(torch.tensor([float(self.signal or 0)])))
        self.signal = self.signal or (signal.SIGTERM if number else None)
        return self.signal is not None

    def _log(self, line: dict[str, Any]) -> None:
        if self.rank == 0:
            with naming(self.metrics), open(self.metrics, "a") as file:
                file.write(json.dumps(line) + "\n")
            print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in line.items()), flush=True)

    def _save(self) -> None:
        """Write the checkpoint atomically. If the run is killed while it writes, the previous checkpoint remains."""
        if self.rank:
            return
        state = {
            "config": OmegaConf.to_container(self.config),
            "step": self.step,
            "epoch": self.epoch,
            "data": self.data.state_dict(),  # the same on all ranks
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_tensors(self.checkpoint, state)

    def _resume(self) -> None:
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise NemoLfrError(f"{self.checkpoint}: damaged checkpoint; remove it to train from the start.") from error
        config = OmegaConf.to_container(self.config)
        if differ := sorted(key for key in config if key not in FREE and config[key] != state["config"].get(key)):
            raise NemoLfrError(
                f"{self.checkpoint}: the checkpoint was saved with other values of {', '.join(differ)}; restore these "
                "options, or choose another out=."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.epoch = state["step"], state["epoch"]
        self.data.load_state_dict(state["data"])
        if self.rank == 0:
            print(f"resumed at step {self.step}", flush=True)

    def _trim_metrics(self) -> None:
        """Remove the lines of later steps, which will be written again, and a truncated last line."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(errors="replace").splitlines()
        kept = []
        for number, line in enumerate(lines, start=1):
            try:
                if json.loads(line)["step"] <= self.step:
                    kept.append(line)
            except (ValueError, TypeError, KeyError) as error:
                if number < len(lines):  # a killed run or a full disk truncates the last line only
                    raise NemoLfrError(
                        f"{self.metrics}: line {number} is damaged; remove this line to resume the run."
                    ) from error
        with replacing(self.metrics) as file:
            file.write("".join(line + "\n" for line in kept).encode())


def read_config(path: Path, overrides: list[str]) -> DictConfig:
    """Read a config file and the options of the command line.

    Raises:
        NemoLfrError: if an option is unknown or missing, or a value is invalid.
    """
    try:
        config = OmegaConf.load(path)
        OmegaConf.set_struct(config, True)
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(overrides))
        for key in ("tokens", "out"):
            _ = config[key]  # raises for ???
    except (OSError, OmegaConfBaseException, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()) if isinstance(error, yaml.YAMLError) else str(error).splitlines()[0]
        raise NemoLfrError(f"{path.name}: {reason}; pass options such as tokens=FOLDER out=FOLDER.") from error
    assert isinstance(config, DictConfig)
    check_numbers(config, OmegaConf.to_container(OmegaConf.load(CONFIG)))
    if config.model.width % config.model.heads:
        raise NemoLfrError(
            f"model.width is {config.model.width}; pass a multiple of model.heads ({config.model.heads})."
        )
    return config


def check_numbers(config: Any, defaults: Any, prefix: str = "") -> None:
    """Raise NemoLfrError if a number is negative, is 0 although it must be positive, or has the wrong type."""
    for key, default in defaults.items():
        value = config[key]
        if isinstance(default, dict) and not isinstance(value, DictConfig):
            example = next(iter(default))
            raise NemoLfrError(f"{prefix}{key} is {value!r}; set its values, such as {prefix}{key}.{example}=...")
        if isinstance(default, dict):
            check_numbers(value, default, f"{key}.")
        elif isinstance(default, int | float):
            kinds = int if isinstance(default, int) else (int, float)
            is_low = not isinstance(value, kinds) or value < 0 or (value == 0 and key not in ZERO)
            if isinstance(value, bool) or is_low:
                allowed = "0 or a positive" if key in ZERO else "a positive"
                raise NemoLfrError(f"{prefix}{key} is {value!r}; pass {allowed} {type(default).__name__}.")
            if (key == "seed" and value >= 2**40) or (key == "temperature" and value < 1e-3):
                bound = "less than 2^40" if key == "seed" else "0.001 or more"
                raise NemoLfrError(f"{key} is {value!r}; pass {bound}.")


@contextlib.contextmanager
def output_folder(path: str) -> Iterator[None]:
    """Create the output folder, and lock it while this context manager is active.

    Only rank 0 locks the folder, because the other ranks do not write to it.

    Raises:
        NemoLfrError: if the folder cannot be created, or another run is using it.
    """
    out = expand_home(path)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NemoLfrError(f"{out}: cannot be used as a folder ({error.strerror}); choose another out=.") from error
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    with exclusive(out) if is_first else contextlib.nullcontext():
        if is_first:
            sweep(out, ("checkpoint.pt", "metrics.jsonl"))
        yield


def plot(metrics: Path, picture: Path) -> None:
    """Draw the losses in `metrics.jsonl`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for name, label in (("train_bits_per_frame", "training batch"), ("valid_bits_per_frame", "validation")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="step", ylabel="bits per frame")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options of the config file")
    parser.add_argument("--config", type=Path, default=CONFIG, help="config file (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="file for a plot of the losses")
    args = parser.parse_args(arguments)
    is_parallel = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if is_parallel:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    handlers, trainer = {}, None
    locks = contextlib.ExitStack()
    try:
        config = read_config(args.config, args.overrides)
        locks.enter_context(output_folder(config.out))
        trainer = Trainer(config)
        handlers = {number: signal.signal(number, trainer.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        trainer.train()
        if trainer.signal is not None:
            print(f"saved {trainer.checkpoint} at step {trainer.step}; the same command resumes the run", flush=True)
            return 128 + trainer.signal
        if trainer.rank == 0 and trainer.config.sample_frames:
            trainer.write_sample()
        if trainer.rank == 0 and args.plot is not None:
            plot(trainer.metrics, args.plot)
    except NemoLfrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, soundfile.LibsndfileError) as error:  # for instance a full disk
        print(f"error: {error}; the same command resumes the run", file=sys.stderr)
        return 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        locks.close()
        if is_parallel:
            # DistributedDataParallel keeps the process group alive. If it is freed last, its destructor waits for the
            # threads of Gloo and holds the GIL, which these threads may need: a deadlock. So free it first.
            trainer = None
            gc.collect()
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
