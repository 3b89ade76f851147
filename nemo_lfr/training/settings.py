"""Validate the numbers in training configs.

Each table maps the key of a setting to the range of its valid values. `check_settings` compares a section of a config
with a table.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nemo_lfr.errors import ConfigError, quoted, shorten

MAX = 10**9  # limit for settings that have no other limit; larger values are mistakes


class Range(NamedTuple):
    """Range of the valid values of a setting.

    Attributes:
        is_whole: whether the value must be a whole number.
        least: smallest valid value.
        most: largest valid value.
        is_open: whether values must be greater than `least`, instead of at least `least`.
    """

    is_whole: bool
    least: int
    most: float = MAX
    is_open: bool = False

    def contains(self, value: Any) -> bool:
        """Return whether a value is a number in this range."""
        kind = numbers.Integral if self.is_whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        number: Any = value
        return bool((number > self.least if self.is_open else number >= self.least) and number <= self.most)

    def __str__(self) -> str:
        """Describe the range, for error messages."""
        kind = "a whole number" if self.is_whole else "a number"
        if math.isinf(self.most):
            return f"{kind} {'greater than' if self.is_open else 'of at least'} {self.least}"
        return f"{kind} {'greater than 0 and up' if self.is_open else f'from {self.least}'} to {self.most:.0f}"


COUNT, COUNT_OR_ZERO = Range(True, 1), Range(True, 0)
POSITIVE, POSITIVE_OR_ZERO = Range(False, 0, is_open=True), Range(False, 0)

# Arguments of `CodecDataset`
DATASET = {
    "n_samples": COUNT,
    "weighted_sampling_steps_per_epoch": COUNT,
    "min_duration": POSITIVE_OR_ZERO,
    "max_duration": Range(False, 0, math.inf, is_open=True),
    "trunc_duration": Range(False, 0, math.inf, is_open=True),
}
# Arguments of `CutDataset`
CUTS = {"segment_duration": POSITIVE}
# Section `dataloader_params`
LOADER = {
    "batch_size": Range(True, 1, 10**6),
    "num_workers": Range(True, 0, 1024),
    "prefetch_factor": COUNT,
    "timeout": POSITIVE_OR_ZERO,
}
# Model config
MODEL = {
    "max_steps": Range(True, -1),  # in Lightning, -1 means no limit
    "max_epochs": Range(True, -1),
    "steps_per_epoch": COUNT,
    "accumulate_grad_batches": COUNT,
    "disc_update_period": COUNT,
    "disc_updates_per_period": COUNT_OR_ZERO,
    "disc_start_epoch": COUNT_OR_ZERO,
    "mel_loss_l1_scale": POSITIVE_OR_ZERO,
    "mel_loss_l2_scale": POSITIVE_OR_ZERO,
    "stft_loss_scale": POSITIVE_OR_ZERO,
    "log_mel_loss_scale": POSITIVE_OR_ZERO,
    "time_domain_loss_scale": POSITIVE_OR_ZERO,
    "si_sdr_loss_scale": POSITIVE_OR_ZERO,
    "spread_loss_scale": POSITIVE_OR_ZERO,
    "gen_loss_scale": POSITIVE_OR_ZERO,
    "feature_loss_scale": POSITIVE_OR_ZERO,
    "mel_loss_log_guard": POSITIVE,
    "stft_loss_log_guard": POSITIVE,
    "codebook_dropout_rate": Range(False, 0, 1),
    "encoder_noise_stdev": POSITIVE_OR_ZERO,
    "clip_grad_norm": POSITIVE,
    "ema_decay": Range(False, 0, 1),
}

# Sections `optim` and `optim.sched` of the model config
OPTIMIZER = {"lr": POSITIVE_OR_ZERO, "weight_decay": POSITIVE_OR_ZERO}
SCHEDULE = {
    "gamma": POSITIVE,
    "min_lr": POSITIVE_OR_ZERO,
    "warmup_steps": COUNT_OR_ZERO,
    "warmup_ratio": Range(False, 0, 1),
}


def check_settings(section: Mapping[str, Any], ranges: Mapping[str, Range], where: str = "") -> None:
    """Validate the numbers in a section of a config.

    Args:
        section: values by key. A key that is missing, or whose value is None, is not checked.
        ranges: range of each number, by key.
        where: name of the section in the config, for error messages.

    Raises:
        ConfigError: if a value is not a number in its range. The message names the key and the range.
    """
    for key, valid in ranges.items():
        value = section.get(key)
        if value is not None and not valid.contains(value):
            raise ConfigError(f"{f'{where}.' if where else ''}{key} is {quoted(value)}; pass {valid}.")


def check_resolutions(resolutions: Any, name: str) -> None:
    """Validate a list of STFT resolutions.

    Args:
        resolutions: list of (n_fft, hop, window), in samples.
        name: name of the list in the config, for error messages.

    Raises:
        ConfigError: if the value is not such a list, or a window is longer than its FFT.
    """
    if not _is_list(resolutions) or not resolutions:
        raise ConfigError(f"{name} is {quoted(resolutions)}; pass a list of [FFT size, hop, window].")
    for item in resolutions:
        is_triple = _is_list(item) and len(item) == 3 and all(COUNT.contains(size) for size in item)
        if not is_triple or item[0] < 2 or item[2] > item[0]:
            raise ConfigError(
                f"{name} contains {shorten(item)}; pass [FFT size, hop, window] as whole numbers of samples, with an "
                "FFT size of at least 2 and a window that is not longer than the FFT size."
            )


def check_counts(values: Any, name: str) -> None:
    """Validate a list of positive whole numbers.

    Args:
        values: the list.
        name: name of the list in the config, for error messages.

    Raises:
        ConfigError: if `values` is not a list, is empty, or contains anything but positive whole numbers.
    """
    if not _is_list(values) or not values or not all(COUNT.contains(value) for value in values):
        raise ConfigError(f"{name} is {quoted(values)}; pass a list of whole numbers of at least 1.")


def check_model(config: Mapping[str, Any]) -> None:
    """Validate the numbers in a model config that affect only training.

    Args:
        config: model config, as Python values.

    Raises:
        ConfigError: if a number is out of its range, or contradicts another one.
    """
    check_settings(config, MODEL)
    optim = config.get("optim")
    if isinstance(optim, Mapping):
        check_settings(optim, OPTIMIZER, "optim")
        if isinstance(optim.get("sched"), Mapping):
            check_settings(optim["sched"], SCHEDULE, "optim.sched")
    updates, period = config.get("disc_updates_per_period"), config.get("disc_update_period")
    if (1 if updates is None else updates) > (1 if period is None else period):
        raise ConfigError(
            f"disc_updates_per_period is {1 if updates is None else updates}, but disc_update_period is only "
            f"{1 if period is None else period} steps; set disc_updates_per_period to disc_update_period or less."
        )
    check_resolutions(config.get("loss_resolutions"), "loss_resolutions")
    check_counts(config.get("mel_loss_dims"), "mel_loss_dims")
    if len(config["loss_resolutions"]) != len(config["mel_loss_dims"]):
        raise ConfigError(
            f"loss_resolutions has {len(config['loss_resolutions'])} items, but mel_loss_dims has "
            f"{len(config['mel_loss_dims'])}; pass one number of mel bands for each resolution."
        )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
