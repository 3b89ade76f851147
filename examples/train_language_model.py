"""Train a small language model on tokens, and sample audio from it.

The input is a folder written by `nemo-lfr tokenize`, the output a WAV file.

    nemo-lfr tokenize speech/ --out tokens/
    python examples/train_language_model.py tokens/ --seconds 60 --out sample.wav
    python examples/train_language_model.py tokens/ --server http://127.0.0.1:8000    # decode while sampling

A causal transformer reads frames, each embedded as the sum of its codebooks' embeddings, and predicts all tokens of
the next frame at once, independently for each codebook. It is a minimal example of how to read tokens: in a minute of
training on a CPU the model learns how frequent tokens are, but not to produce speech.
"""

import argparse
import math
import time
from collections.abc import Iterator

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import nn

from nemo_lfr import load
from nemo_lfr.client import Client
from nemo_lfr.corpus.dataset import TokenDataset
from nemo_lfr.io.locate import expand_home

FRAMES = 64  # frames per training segment: 3 seconds


class FrameModel(nn.Module):
    """Causal transformer that predicts the tokens of the next frame.

    Args:
        num_codebooks: number of codebooks C.
        codebook_size: entries per codebook.
        width: hidden channels.
        layers: number of transformer layers.
    """

    def __init__(self, num_codebooks: int, codebook_size: int, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.shape = num_codebooks, codebook_size
        self.embedding = nn.Embedding(num_codebooks * codebook_size, width)
        self.position = nn.Embedding(FRAMES, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, num_codebooks * codebook_size)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Predict the tokens of each next frame.

        Args:
            tokens: ids in [0, codebook_size), shape [B, T, C].

        Returns:
            Logits, shape [B, T, C, codebook_size].
        """
        num_codebooks, codebook_size = self.shape
        offsets = torch.arange(num_codebooks) * codebook_size
        hidden = self.embedding(tokens + offsets).sum(2) + self.position.weight[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.layers(hidden, mask=mask, is_causal=True)).unflatten(2, self.shape)

    def sample(self, start: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Sample frames that continue a sequence.

        Args:
            start: first frames, shape [1, T, C].
            num_frames: number of frames to sample.

        Returns:
            The first frames and the sampled ones, shape [1, T + num_frames, C].
        """
        return torch.stack(list(self.frames(start, num_frames)))[None]

    @torch.no_grad()
    def frames(self, start: torch.Tensor, num_frames: int) -> Iterator[torch.Tensor]:
        """Yield the frames of `sample` one by one, each of shape [C], as soon as they are known."""
        yield from start[0]
        tokens = start
        for _ in range(num_frames):
            scores = self(tokens[:, -FRAMES:])[:, -1]  # [1, C, codebook_size]
            frame = torch.multinomial(scores[0].softmax(-1), 1).T
            tokens = torch.cat([tokens, frame[None]], dim=1)
            yield frame[0]


def speak(frames: Iterator[torch.Tensor], server: str) -> tuple[np.ndarray, int]:
    """Decode frames on a server while they are sampled.

    Args:
        frames: tokens, shape [C] each.
        server: URL of `nemo-lfr serve`.

    Returns:
        Audio, float32 [T_audio], and its sample rate in Hz. A real application plays each piece at once.
    """
    pieces, started, first = [], time.monotonic(), None
    with Client(server, retry_s=10).decode_stream(ramp=(1, 2, 4)) as stream:
        for number, frame in enumerate(frames):
            pieces.append(stream.push(frame.numpy()))
            if first is None and len(pieces[-1]):
                first = number + 1
                print(f"first audio after {time.monotonic() - started:.2f} s, at frame {first}")
        pieces.append(stream.flush())
        return np.concatenate(pieces), stream.sample_rate


def segments(dataset: TokenDataset, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield batches of training segments endlessly.

    Utterances are concatenated, like documents in text training.

    Args:
        dataset: tokenized utterances.
        batch_size: segments per batch.

    Yields:
        Tokens, shape [batch_size, FRAMES + 1, C].
    """
    held = torch.zeros(0, dataset.num_codebooks, dtype=torch.int64)
    size = batch_size * (FRAMES + 1)
    while True:
        for utterance in dataset:
            held = torch.cat([held, utterance.tokens.T])
            while len(held) >= size:
                yield held[:size].view(batch_size, FRAMES + 1, -1)
                held = held[size:]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=expand_home, help="a folder that nemo-lfr tokenize wrote")
    parser.add_argument("--seconds", type=float, default=60, help="of training")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--model", help="the codec that made the tokens; the bundled one if not given")
    parser.add_argument("--server", help="URL of nemo-lfr serve; it decodes each frame as soon as it is sampled")
    parser.add_argument("--out", type=expand_home, default="sample.wav")
    args = parser.parse_args()
    torch.manual_seed(0)
    dataset = TokenDataset(args.tokens, shuffle=True)
    if not len(dataset):
        raise SystemExit(f"{args.tokens}: holds no utterance to learn from.")
    model = FrameModel(dataset.num_codebooks, dataset.codebook_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    print(f"a guess costs {math.log(dataset.codebook_size):.2f} nats a token")
    started = time.monotonic()
    for step, batch in enumerate(segments(dataset, args.batch_size)):
        scores = model(batch[:, :-1])
        loss = F.cross_entropy(scores.flatten(0, 2), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: {loss.item():.3f} nats a token", flush=True)
        if time.monotonic() - started > args.seconds:
            break
    start, num_frames = batch[:1, :8], 64
    if args.server:
        audio, sample_rate = speak(model.frames(start, num_frames), args.server)
    else:
        codec = load(args.model)
        decoded, _ = codec.decode(model.sample(start, num_frames).transpose(1, 2))
        audio, sample_rate = decoded[0].cpu().numpy(), codec.sample_rate
    soundfile.write(args.out, audio, sample_rate)
    prompt_s = len(audio) / sample_rate * 8 / (8 + num_frames)
    print(f"{args.out}: {len(audio) / sample_rate:.1f} s; the first {prompt_s:.1f} s are of the corpus")


if __name__ == "__main__":
    main()
