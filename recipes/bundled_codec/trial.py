"""States of the trial script that came before this recipe: its arguments as settings of ours.

Its `state.pt` holds "args" (the command line as a dictionary), "model" and "average" (state dicts of a `Generator`),
"moments" and "adam" (of the two optimizers), "step" and "seconds".
"""

from collections.abc import Mapping
from typing import Any

from recipes.bundled_codec.model import DecoderConfig, EncoderConfig, NetworkConfig


def network_of_trial(args: Mapping[str, Any]) -> NetworkConfig:
    """The network that a trial's arguments describe."""
    return NetworkConfig(
        audio_encoder=EncoderConfig(
            down_sample_rates=list(args["enc_rates"]),
            base_channels=args["enc"],
            resblock_kernel_sizes=list(args["enc_kernels"]),
            resblock_dilation_sizes=list(args["enc_dil"]),
            activation=args["act"],
        ),
        audio_decoder=DecoderConfig(
            up_sample_rates=list(args["dec_rates"]),
            base_channels=args["dec"],
            resblock_kernel_sizes=list(args["dec_kernels"]),
            resblock_dilation_sizes=list(args["dec_dil"]),
            activation=args["act"],
        ),
    )
