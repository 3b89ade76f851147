"""Support for copying and pickling the model for `transformers`."""

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from nemo_lfr.checkpoint import copying
from nemo_lfr.codec.ambient import building_state
from nemo_lfr.modules.altered import PICKLE
from nemo_lfr.modules.empty import on_meta_device

if TYPE_CHECKING:
    from typing_extensions import Self

_unpickled = copying.refuse_pickle  # pickles of earlier versions contain this name


class Copies(copying.Copies):
    """Mixin with the methods that `copy` and `pickle` call."""

    config: Any
    _kept: ClassVar = ("_is_validated",)
    _recomputed: ClassVar = ("_is_hf_initialized",)

    def __reduce__(self) -> Any:
        """Return the config and the weights, so that `pickle` can rebuild the model from them.

        Raises:
            NemoLfrError: if the model has changes that would be lost, such as hooks or added modules.
        """
        model: Any = self
        model.codec.backend.check_described(PICKLE)
        return super().__reduce__()

    def _recipe(self) -> dict[str, Any]:
        return {"config": copy.deepcopy(self.config)}

    @classmethod
    def _rebuilt(cls, recipe: dict[str, Any], has_weights: bool) -> "Self":
        with building_state(torch.device("cpu")), nullcontext() if has_weights else on_meta_device():
            return cls(**recipe)
