"""Export the averaged weights of a training state as a `.nemo` file.

    python -m recipes.bundled_codec.export runs/bundled/state.pt --out bundled.nemo

Both this package and NeMo 3.0 can open the file. Weights are stored in fp16, which halves the size of the file and
does not change the metrics. The weight of each convolution is stored as two tensors (direction and gain of weight
norm), because NeMo's modules expect them.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_lfr.checkpoint import split_weight_norm, write_checkpoint
from nemo_lfr.checkpoint.names import DIRECTION, GAIN
from nemo_lfr.io.locate import expand_home
from recipes.bundled_codec.model import SAMPLE_RATE, Generator, NetworkConfig
from recipes.bundled_codec.states import read_generator

CODEC = "nemo_lfr.codec."
LOSSES = "nemo.collections.tts.losses.audio_codec_loss."


def codec_config(network: NetworkConfig, samples_per_frame: int) -> dict[str, Any]:
    """Build the model config for a `.nemo` file.

    Args:
        network: sizes of the network.
        samples_per_frame: number of samples per frame.

    Returns:
        The config as a dictionary.
    """
    sizes = asdict(network)
    return {
        "sample_rate": SAMPLE_RATE,
        "samples_per_frame": samples_per_frame,
        "audio_encoder": {"_target_": CODEC + "encoder.HiFiGANEncoder", "pad_mode": "zeros"} | sizes["audio_encoder"],
        "vector_quantizer": {"_target_": CODEC + "quantizer.GroupFiniteScalarQuantizer"} | sizes["vector_quantizer"],
        "audio_decoder": {
            "_target_": CODEC + "decoder.HiFiGANDecoder",
            "pad_mode": "zeros",
            "output_activation": "tanh",
        }
        | sizes["audio_decoder"],
        # NeMo's constructor requires losses even for inference. These are the losses in the released config.
        "discriminator": None,
        "generator_loss": {"_target_": LOSSES + "GeneratorSquaredLoss"},
        "discriminator_loss": {"_target_": LOSSES + "DiscriminatorSquaredLoss"},
        "loss_resolutions": [[512, 128, 512], [1024, 256, 1024], [2048, 512, 2048]],
        "mel_loss_dims": [80, 160, 320],
        "commit_loss_scale": 0.0,
    }


def export(generator: Generator, network: NetworkConfig, path: Path) -> None:
    """Write a trained generator as a `.nemo` file with fp16 weights.

    Raises:
        ValueError: if a weight is NaN or outside the range of fp16.
    """
    state = {
        f"{name}.{key}": value.half().contiguous() if value.is_floating_point() else value
        for name, module in generator.named_children()
        for key, value in split_weight_norm(module).items()
    }
    for key in [key for key in state if key.endswith(DIRECTION)]:
        # The initial weights contain filters of zeros, whose direction is not defined. Any direction can be stored,
        # because the gain is zero.
        empty = ~state[key].flatten(1).any(dim=1)
        state[key][empty] = 1
        state[key.removesuffix(DIRECTION) + GAIN][empty] = 0
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(
                f"weight {key} has values that are NaN or outside the range of fp16; train longer, or with another "
                "seed."
            )
    write_checkpoint(path, codec_config(network, generator.samples_per_frame), state)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=expand_home, help="state.pt that train.py wrote")
    parser.add_argument("--out", type=expand_home, required=True, help="output .nemo file")
    args = parser.parse_args()
    try:
        generator, network, updates = read_generator(args.state)
        export(generator, network, args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.out}: averaged weights after {updates:,} updates, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
