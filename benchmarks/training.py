"""Training steps of the released codec, compared with stock NeMo.

    python benchmarks/training.py [--batch-size 1] [--frames 24] [--rounds 3] [--device cuda] [--precision bf16-mixed]

The benchmark compares time, losses and memory. The model has full size, as in the released config: a generator with
112.7 M parameters, 5 STFT and 5 period discriminators, and WavLM base (random weights) as the SLM discriminator. The
discriminators are updated every second step, and the optimizer is Adam. Both implementations start from the same
weights, run in separate processes and alternate, two steps each. The first round is a warm-up whose times are
discarded but whose losses are compared. WavLM is in evaluation mode for both implementations, although NeMo itself
leaves it in training mode. Times cover the training steps, without the startup of the trainer and data loading.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning.pytorch as pl
import torch
from nemo.collections.tts.models.audio_codec import AudioCodecModel as StockModel
from omegaconf import OmegaConf

from benchmarks.measure import machine, ratios, spread
from nemo_lfr import AudioCodecModel
from tests.models import FULL_SIZE, speech_like
from tests.nemo.test_training_with_nemo import ALL_STFT, LOSSES, MODULES, training_config

STOCK, OURS = "stock NeMo", "nemo_lfr"
STEPS = 2  # the discriminators are updated in one of them


def released_config(wavlm: str) -> dict[str, Any]:
    """Return the training config of the released codec with a local WavLM folder."""
    slm = {"_target_": MODULES + "SLMDiscriminator", "slm_model_name": wavlm, "slm_sr": 16000, "input_sr": 22050}
    period = {"_target_": MODULES + "MultiPeriodDiscriminator"}
    resolutions = [[size, size // 4, size] for size in (32, 64, 128, 256, 512, 1024, 2048)]
    return training_config(
        [ALL_STFT, period, slm],
        disc_update_period=2,
        loss_resolutions=resolutions,
        mel_loss_dims=[5, 10, 20, 40, 80, 160, 320],
        generator_loss={"_target_": LOSSES + "GeneratorSquaredLoss"},
        optim={"_target_": "torch.optim.Adam", "lr": 2e-4, "betas": [0.8, 0.99]},
        **FULL_SIZE,
    )


class Turns(pl.Callback):
    """Callback that runs `STEPS` training steps for each request of the main process, and reports seconds per step.

    It keeps the losses of the first step, and puts WavLM in evaluation mode.
    """

    def __init__(self, pipe: Connection, device: str) -> None:
        self.pipe, self.device = pipe, device
        self.losses: dict[str, float] = {}
        self.started = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, model: pl.LightningModule, batch: Any, number: int) -> None:
        """Before each group of `STEPS` steps, wait for the main process's request and start the clock."""
        for module in model.modules():
            if type(module).__name__ == "WavLMModel":
                module.eval()
        if number % STEPS == 0:
            self.pipe.recv()
            self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, model: pl.LightningModule, outputs: Any, batch: Any, number: int
    ) -> None:
        """After every `STEPS` steps, report the mean time of a step. Keep the losses of the first step."""
        if (number + 1) % STEPS == 0:
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.pipe.send((time.perf_counter() - self.started) / STEPS)
        self.losses = self.losses or {key: float(value) for key, value in trainer.logged_metrics.items()}


def work(name: str, folder: str, args: argparse.Namespace, pipe: Connection) -> None:
    """Train one model on request, then send the losses of its first step and the peak memory in GiB."""
    torch.manual_seed(0)
    config = OmegaConf.create(released_config(folder))
    weights = Path(folder, "weights.pt")
    if name == STOCK:
        model = StockModel(config)
        torch.save(model.state_dict(), weights)
    else:
        model = AudioCodecModel(config)
        model.load_state_dict(torch.load(weights, weights_only=True))
    samples = args.frames * 1024
    audio = torch.stack([speech_like(samples + 100, seed)[:samples] for seed in range(args.batch_size)])
    batch = {"audio": audio, "audio_lens": torch.full((args.batch_size,), samples)}
    turns = Turns(pipe, args.device)
    trainer = pl.Trainer(
        accelerator="gpu" if args.device == "cuda" else "cpu",
        devices=1,
        precision="32-true" if name == STOCK else args.precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[turns],
    )
    pipe.send("ready")
    batches = [batch] * (STEPS * (args.rounds + 1))
    trainer.fit(model, train_dataloaders=torch.utils.data.DataLoader(batches, batch_size=None))
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send((turns.losses, peak / 2**30))


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32-true", help="precision of nemo_lfr; stock NeMo runs in fp32")
    args = parser.parse_args()
    from transformers import WavLMConfig, WavLMModel

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        WavLMModel(WavLMConfig()).save_pretrained(folder)
        pipes: dict[str, Connection] = {}
        for name in (STOCK, OURS):
            pipes[name], end = context.Pipe()
            context.Process(target=work, args=(name, folder, args, end), daemon=True).start()
            end.close()
            pipes[name].recv()
        seconds: dict[str, list[float]] = {name: [] for name in pipes}
        for number in range(args.rounds + 1):
            for name, pipe in pipes.items():
                pipe.send("go")
                taken = pipe.recv()
                if number:
                    seconds[name].append(taken)
                print(f"round {number}  {name:12} {taken:7.2f} s per step", file=sys.stderr, flush=True)
        results = {name: pipe.recv() for name, pipe in pipes.items()}
    (expected, _), (mine, _) = results.values()
    names = sorted(key for key in expected if "loss" in key)
    differences = {name: abs(mine[name] - expected[name]) / max(abs(expected[name]), 1e-12) for name in names}
    faster = ratios(*seconds.values())
    for name, values in seconds.items():
        print(f"{name:12} {spread(values)} s per step, peak memory {results[name][1]:.2f} GiB")
    print("largest relative difference of a loss in the first step:", f"{max(differences.values()):.1e}", differences)
    mean = statistics.geometric_mean(faster)
    size = f"batch of {args.batch_size} x {args.frames * 1024} samples"
    print(f"{spread(faster)} times as fast, geometric mean {mean:.2f}, {size}")
    print(f"{machine()}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
