"""Metrics that third-party trained models compute. Each kind of model has its own module.

To add such metrics, define a subclass of `ModelMetric` and decorate it with `register_model_metric`. If a model is not
available, its metrics are reported as `NotMeasured` with the reason, and the evaluation continues.
"""

from collections.abc import Mapping
from typing import NamedTuple

from nemo_lfr.errors import NemoLfrError, shorten
from nemo_lfr.evaluation.metrics import METRICS, Metric, NotMeasured
from nemo_lfr.evaluation.model_metrics.base import ModelMetric
from nemo_lfr.evaluation.plugins import add_entry, import_submodules, in_order, load_plugins

_registered: dict[str, type[ModelMetric]] = {}


class OpenedModels(NamedTuple):
    """Models that were loaded, and the reasons why other models were not loaded.

    Attributes:
        models: the loaded models.
        absent: reason for each metric that is not available, by metric name.
        failed: reason for each requested model that could not be loaded, by kind of model.
    """

    models: list[ModelMetric]
    absent: dict[str, NotMeasured]
    failed: dict[str, str]


def register_model_metric(metric: type[ModelMetric]) -> type[ModelMetric]:
    """Register a subclass of `ModelMetric` under its `kind`. This function can be used as a class decorator.

    Args:
        metric: the class.

    Returns:
        `metric` itself.

    Raises:
        NemoLfrError: if the `kind` of `metric` is already registered by another class, or another metric already has
            one of the names in `metric.metrics`.
    """
    others = set(METRICS).union(*(other.metrics for kind, other in _registered.items() if kind != metric.kind))
    if taken := others & set(metric.metrics):
        raise NemoLfrError(f"metric {min(taken)!r} is already registered; choose another name.")
    add_entry(_registered, metric.kind, metric, "model metric")
    return metric


def model_metric_kinds() -> dict[str, type[ModelMetric]]:
    """Return the registered subclasses of `ModelMetric` by `kind`, including those of installed packages."""
    import_submodules(__name__)
    load_plugins()
    return in_order(_registered, __name__)


def all_metrics() -> dict[str, Metric]:
    """Return the descriptions of all metrics by name. Metrics that models compute come last."""
    kinds = model_metric_kinds()
    return METRICS | {name: metric for kind in kinds.values() for name, metric in kind.metrics.items()}


def open_model_metrics(sources: Mapping[str, str], device: str) -> OpenedModels:
    """Load the requested models, and the models that need no request (see `ModelMetric.automatic`).

    If a model cannot be loaded, the result contains the reason.

    Args:
        sources: for each requested `kind`, the model to load; an empty string for the default model.
        device: PyTorch device.

    Returns:
        The loaded models, and the reasons why metrics are not available.

    Raises:
        NemoLfrError: if a kind is unknown.
    """
    kinds = model_metric_kinds()
    if unknown := sources.keys() - kinds.keys():
        raise NemoLfrError(f"model metric {min(unknown)!r} is unknown; use one of {list(kinds)}.")
    opened = OpenedModels([], {}, {})
    for kind, metric in kinds.items():
        if kind not in sources and not metric.automatic:
            reason = f"{metric.option or f'--model-metric {kind}'} was not passed"
        else:
            try:
                opened.models.append(metric(sources.get(kind, ""), device))
                continue
            except ModuleNotFoundError as error:
                reason = f"{error.name} is not installed"
            except Exception as error:  # third-party model loaders can raise anything
                reason = shorten(" ".join(str(error).split()), 200) or type(error).__name__
            if kind in sources:
                opened.failed[kind] = reason
        opened.absent.update(dict.fromkeys(metric.metrics, NotMeasured(f"not measured: {reason}")))
    return opened
