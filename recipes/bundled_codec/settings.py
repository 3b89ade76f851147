"""Read the settings of a run from `bundled.yaml`, with overrides from the command line."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_lfr.checkpoint import check_interpolations
from nemo_lfr.training.components import import_components
from nemo_lfr.training.discriminators import BUILT_IN
from recipes.bundled_codec.data import AugmentConfig
from recipes.bundled_codec.discriminators import DiscriminatorConfig
from recipes.bundled_codec.losses import LossConfig
from recipes.bundled_codec.model import NetworkConfig

_UNION = next(iter(BUILT_IN))
DEFAULT_CONFIG = Path(__file__).with_name("bundled.yaml")


@dataclass
class Settings:
    """All settings of a run. Each setting is described in `bundled.yaml`."""

    train: list[str] = MISSING
    valid: str = MISSING
    out: str = MISSING
    updates: int = MISSING
    device: str = MISSING
    audio_dir: str | None = None
    init: str | None = None
    minutes: float | None = None
    threads: int | None = None
    precision: str = "auto"
    seed: int = 0
    batch_size: int = 6
    segment_frames: int = 24
    lr: float = 2e-3
    final_lr: float = 0.05
    warmup_updates: int = 100
    average_decay: float = 0.999
    save_minutes: float = 5.0
    log_updates: int = 100
    evaluate_updates: int = 1000
    evaluate_clips: int = 10
    evaluate_seconds: float = 6.0
    start_segments: int = 16
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    discriminators: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as a dictionary of Python values, for a state file."""
        return asdict(self)


def read_settings(config: Path = DEFAULT_CONFIG, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML file of settings, apply overrides, and import the components that the settings name.

    Args:
        config: YAML file.
        overrides: texts of the form `key=value`, such as `discriminators.from_update=40000`.

    Returns:
        The validated settings.

    Raises:
        ValueError: if a key is unknown, or a value is invalid or missing.
        ConfigError: if a component cannot be imported, or an OmegaConf interpolation is too long.
    """
    listed = [
        f"train=[{text.removeprefix('train=')}]" if text.startswith("train=") and "[" not in text else text
        for text in overrides
    ]
    try:
        check_interpolations(Path(config).read_text("utf-8"))
        merged = OmegaConf.merge(
            OmegaConf.structured(Settings), OmegaConf.load(config), OmegaConf.from_dotlist(listed)
        )
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ValueError(f"no value for {', '.join(missing)}; pass {missing[0]}=VALUE, or set it in {config}.")
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{config} with {listed or 'no overrides'}: {str(error).splitlines()[0]}") from error
    assert isinstance(settings, Settings)
    if not settings.out or not settings.valid or not all(settings.train):
        raise ValueError("out, valid or train is empty; set each of them to a path.")
    for name in ("updates", "batch_size", "segment_frames", "log_updates", "evaluate_updates", "evaluate_clips"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; pass 1 or more.")
    named = {
        "discriminator": {"_target_": _UNION, "discriminators": settings.discriminators.custom},
        "losses": settings.losses.custom,
        "metrics": settings.metrics,
    }
    import_components(named, BUILT_IN)
    return settings
