"""Read and write training states, and load generators from training states or `.nemo` files.

A state of this recipe is a dictionary with the keys "format" (1), "settings", "step", "seconds", "generator",
"average" and "trainer". `torch.load` reads it with `weights_only=True`.

Before this recipe existed, an older training script was used. Its states contain "args" (the command line as a
dictionary), "model" and "average" (state dicts of a `Generator`), "moments" and "adam" (states of the two optimizers),
"step" and "seconds".
"""

import pickle
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from nemo_lfr.checkpoint import read_checkpoint
from nemo_lfr.io.tensor_file import save_tensors
from recipes.bundled_codec.model import DecoderConfig, EncoderConfig, Generator, NetworkConfig

FORMAT = 1


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state of this recipe atomically.

    Args:
        path: file to write.
        state: content of the state without the key "format", which is added.

    Raises:
        OSError: if the file cannot be written, for example because the disk is full. The error names `path`.
    """
    save_tensors(path, {"format": FORMAT, **state})


def _load(path: Path) -> Any:
    """Load a file that contains only tensors and Python values.

    Raises:
        ValueError: if the file contains anything else, or is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"{path}: not a training state, or the file is damaged; pass the state.pt of a run."
        ) from error


def load_state(path: Path) -> dict[str, Any]:
    """Read a state of this recipe.

    Args:
        path: file to read.

    Returns:
        The state, with tensors on the CPU.

    Raises:
        ValueError: if the file is not a state of this recipe.
    """
    state = _load(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"{path}: not a state of this recipe; set `out` to a different folder. To continue from a state of the "
            f"older training script, also pass --import-state {path}."
        )
    return state


def network_config(values: Mapping[str, Any]) -> NetworkConfig:
    """Build a `NetworkConfig` from a dictionary."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(NetworkConfig), dict(values)))
    assert isinstance(config, NetworkConfig)
    return config


def _sizes(path: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the values in a codec's config that set fields of a `NetworkConfig`.

    Returns:
        A dict from each section, such as "audio_encoder", to a dict with its values.

    Raises:
        ValueError: if the codec does not pad with zeros.
    """
    sizes = {}
    for section in fields(NetworkConfig):
        values = config[section.name]
        if values.get("pad_mode", "zeros") != "zeros":
            raise ValueError(
                f"{path}: {section.name} has pad_mode {values['pad_mode']!r}; pass a codec with pad_mode 'zeros'."
            )
        known = {field.name for field in fields(section.default_factory)}  # type: ignore[arg-type]
        sizes[section.name] = {name: value for name, value in values.items() if name in known}
    return sizes


def trial_network(args: Mapping[str, Any]) -> NetworkConfig:
    """Return the network config for the arguments of the older training script."""
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


# For each argument of the older training script: the corresponding setting. With equal values, a run that starts from
# an imported state makes the same updates as the older script.
TRIAL_SETTINGS: dict[str, tuple[str, ...]] = {
    "seed": ("seed",),
    "batch": ("batch_size",),
    "frames": ("segment_frames",),
    "lr": ("lr",),
    "end": ("final_lr",),
    "steps": ("updates",),
    "windows": ("losses", "windows"),
    "mels": ("losses", "num_mels"),
    "comp_windows": ("losses", "compressed_windows"),
    "w_mel": ("losses", "log_mel"),
    "w_comp": ("losses", "compressed"),
    "w_pesq": ("losses", "symmetric"),
    "w_wave": ("losses", "waveform"),
}


def import_trial(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Convert a state of the older training script to a state of this recipe.

    Args:
        path: `state.pt` of the older script.
        settings: settings of the run that continues from this state, as a dictionary.

    Returns:
        The state, and a message for each setting that differs from the older run.

    Raises:
        ValueError: if the file is not a state of the older script or contains discriminators, or if its network is not
            that of `settings`.
    """
    trial = _load(path)
    keys = {"args", "model", "average", "moments", "adam", "step", "seconds"}
    missing = keys - set(trial) if isinstance(trial, dict) else keys
    if missing:
        raise ValueError(
            f"{path}: not a complete state of the older training script, because it lacks "
            f"{', '.join(sorted(missing))}; pass its state.pt."
        )
    if "d" in trial:
        raise ValueError(
            f"{path}: contains discriminators, which cannot be imported; pass a state from before they were added."
        )
    if trial_network(trial["args"]) != network_config(settings["network"]):
        raise ValueError(
            f"{path} has another network: {trial_network(trial['args'])}; change network in the settings."
        )
    differences = []
    for name, place in TRIAL_SETTINGS.items():
        ours: Any = settings
        for key in place:
            ours = ours[key]
        theirs = trial["args"][name]
        theirs = list(theirs) if isinstance(theirs, tuple) else theirs
        if ours != theirs:
            differences.append(f"{'.'.join(place)} is {ours}, but was {theirs} in the imported run")
    state = {
        "step": trial["step"],
        "seconds": trial["seconds"],
        "generator": trial["model"],
        "average": trial["average"],
        "trainer": {"optimizer": {"moments": trial["moments"], "adam": trial["adam"]}, "adversary": None},
    }
    return state, differences


def read_generator(path: Path) -> tuple[Generator, NetworkConfig, int]:
    """Read a generator from a `.nemo` file or a training state.

    The training state may be from this recipe, or from the older script that `import_trial` also supports. The
    averaged weights are read.

    Args:
        path: file to read.

    Returns:
        The generator in fp32, its config, and the number of updates with which it was trained (0 for a `.nemo` file).

    Raises:
        ValueError: if the file is neither a `.nemo` file nor a training state, or its codec does not pad with zeros.
        CheckpointError: if a `.nemo` file cannot be read.
    """
    if path.suffix == ".nemo":
        modules, config = read_checkpoint(path)
        network = network_config(_sizes(path, config))
        generator = Generator(network)
        generator.audio_encoder.load_state_dict(modules.encoder.state_dict())
        generator.audio_decoder.load_state_dict(modules.decoder.state_dict())
        return generator, network, 0
    state = _load(path)
    if not isinstance(state, dict) or "average" not in state or not {"args", "settings"} & set(state):
        raise ValueError(
            f"{path}: neither a .nemo file nor a training state; pass a .nemo file or the state.pt of a run."
        )
    network = trial_network(state["args"]) if "args" in state else network_config(state["settings"]["network"])
    generator = Generator(network)
    generator.load_state_dict(state["average"])
    return generator, network, state["step"]
