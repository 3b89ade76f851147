"""Encode and decode the microphone's audio, play the result, and count the tokens.

    pip install sounddevice
    python examples/microphone_to_speaker.py                          use the default devices until Ctrl-C
    python examples/microphone_to_speaker.py --list                   list the devices
    python examples/microphone_to_speaker.py --input talk.wav --output heard.wav    use files instead of devices

Use headphones. The delay is the sum of the encoder's and the decoder's lookahead (`--lookahead`), one block and the
buffers of the devices. If no audio is ready when the speaker needs it, silence is played; the program prints the
number of samples of silence at the end.
"""

import argparse
import queue
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import nemo_lfr
from nemo_lfr.codec import Codec
from nemo_lfr.io.audio import AudioReader, AudioWriter


class Speaker:
    """Audio output that plays samples in the order in which they are written.

    Args:
        rate: sample rate, Hz.
        device: name of the device; None for the default one.
        block: samples per block.
    """

    def __init__(self, rate: int, device: str | None, block: int) -> None:
        import sounddevice

        self._audio = np.zeros(0, np.float32)
        self._waiting: queue.Queue[np.ndarray] = queue.Queue()
        self.dry = 0  # number of samples of silence that were played because no audio was ready
        self._stream = sounddevice.OutputStream(
            samplerate=rate, channels=1, blocksize=block, device=device, callback=self._fill
        )
        self._stream.start()

    def write(self, audio: np.ndarray) -> None:
        """Queue samples [T_audio] for playing."""
        self._waiting.put(audio)

    def finish(self) -> None:
        """Wait until all samples are played, then stop the output."""
        while len(self._audio) or not self._waiting.empty():
            time.sleep(0.05)
        self._stream.stop()

    def _fill(self, out: np.ndarray, num_samples: int, *_: object) -> None:
        while len(self._audio) < num_samples and not self._waiting.empty():
            self._audio = np.concatenate([self._audio, self._waiting.get()])
        now, self._audio = self._audio[:num_samples], self._audio[num_samples:]
        out[:, 0] = np.pad(now, (0, num_samples - len(now)))
        self.dry += num_samples - len(now)


def microphone(rate: int, device: str | None, block: int) -> Iterator[np.ndarray]:
    """Yield blocks of microphone audio as they are recorded.

    Args:
        rate: sample rate, Hz.
        device: name of the device; None for the default one.
        block: samples per block.

    Yields:
        float32 samples, shape [block].
    """
    import sounddevice

    heard: queue.Queue[np.ndarray] = queue.Queue()
    with sounddevice.InputStream(
        samplerate=rate,
        channels=1,
        blocksize=block,
        device=device,
        callback=lambda samples, *_: heard.put(samples[:, 0].copy()),
    ):
        while True:
            yield heard.get()


def talk(codec: Codec, blocks: Iterator[np.ndarray], output: "Speaker | AudioWriter", lookahead: int | None) -> None:
    """Encode and decode block by block until the input ends or the user presses Ctrl-C.

    At the end, the number of frames and the delay are printed.

    Args:
        codec: codec to use.
        blocks: blocks of mono float32 samples at the codec's sample rate, each of shape [n].
        output: speaker or file that receives the decoded audio.
        lookahead: lookahead of the encoder and of the decoder, in frames; None for the full lookaheads.
    """
    encoder, decoder = codec.stream_encoder(lookahead), codec.stream_decoder(lookahead)
    computing, frames = 0.0, 0
    try:
        for samples in blocks:
            begin = time.perf_counter()
            tokens = encoder.push(samples)
            audio = decoder.push(tokens)
            computing += time.perf_counter() - begin
            frames += tokens.shape[1]
            output.write(audio)
            if sys.stderr.isatty():
                seconds = encoder.num_samples / codec.sample_rate
                print(
                    f"\r{seconds:6.1f} s  {frames} frames  {seconds / computing:.1f}x real time",
                    end="",
                    file=sys.stderr,
                )
    except KeyboardInterrupt:
        print(file=sys.stderr)
    rest = encoder.flush()
    output.write(decoder.push(rest))
    output.write(decoder.flush())
    frames += rest.shape[1]
    delay = encoder.latency_ms + decoder.latency_ms
    print(f"{frames} frames of {codec.num_codebooks} tokens; the delay of the codec was {delay:.0f} ms")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", help="audio file, or name of a device (default: the microphone)")
    parser.add_argument("--output", help="audio file, or name of a device (default: the speaker)")
    parser.add_argument("--model", help="checkpoint or Hub id (default: the bundled codec)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--lookahead", type=int, help="lookahead in frames for encoder and decoder (default: full)")
    parser.add_argument("--block", type=int, default=1024, help="samples per block (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="list the devices and exit")
    arguments = parser.parse_args()
    files = [Path(name) if name and Path(name).suffix else None for name in (arguments.input, arguments.output)]
    if arguments.list or None in files:
        try:
            import sounddevice
        except (ImportError, OSError) as error:
            sys.exit(f"microphone and speaker need sounddevice and PortAudio: pip install sounddevice ({error})")
        if arguments.list:
            print(sounddevice.query_devices())
            return
    codec = nemo_lfr.load(arguments.model, arguments.device)
    source, target = files
    try:
        if source is None:
            blocks = microphone(codec.sample_rate, arguments.input, arguments.block)
        else:
            blocks = AudioReader(source, codec.sample_rate).blocks(arguments.block / codec.sample_rate)
        if target is not None:
            with AudioWriter(target, codec.sample_rate, overwrite=True) as writer:
                talk(codec, blocks, writer, arguments.lookahead)
        else:
            speaker = Speaker(codec.sample_rate, arguments.output, arguments.block)
            talk(codec, blocks, speaker, arguments.lookahead)
            speaker.finish()
            print(f"{speaker.dry} samples of silence were played because no audio was ready")
    except nemo_lfr.NemoLfrError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
