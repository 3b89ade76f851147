"""Support for copying and pickling the NeMo model."""

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from nemo_lfr.checkpoint import build_parts, copying
from nemo_lfr.codec.ambient import building_state
from nemo_lfr.modules.empty import on_meta_device
from nemo_lfr.nemo.base import PROXIES, logging
from nemo_lfr.nemo.config import checked_values
from nemo_lfr.nemo.files import READ_PARTS
from nemo_lfr.nemo.packed_files import PackedFiles
from nemo_lfr.nemo.state_dicts import CONFIGURED
from nemo_lfr.training.components import register_component, registered_components

if TYPE_CHECKING:
    from typing_extensions import Self

_unpickled = copying.refuse_pickle  # pickles of earlier versions contain this name


class Copies(copying.Copies, PackedFiles):
    """Mixin with the methods that `copy` and `pickle` call.

    Copies have no trainer. Pickled models have no optimizers and data loaders either.
    """

    _not_copied: ClassVar = ("_codec", "_fabric", "_trainer")
    _shared: ClassVar = ("_train_dl", "_validation_dl", "_test_dl")
    _kept: ClassVar = ("_random_weights", "_is_without_gan", "_restored_from", "_average")
    _recomputed: ClassVar = ("model_guid", "_checked")

    def __reduce__(self) -> Any:
        """See `nemo_lfr.checkpoint.copying.Copies`."""
        with logging.temp_verbosity(logging.ERROR):
            return super().__reduce__()

    def _to_copy(self) -> dict[str, Any]:
        state = super()._to_copy()
        # NeMo puts a proxy around `training_step` of each instance, which `copy` cannot copy.
        if isinstance(state.get("training_step"), PROXIES):
            del state["training_step"]
        return state

    def _recipe(self) -> dict[str, Any]:
        self.check_files_exist()
        return {
            "cfg": self.cfg,
            "has_discriminator": hasattr(self, "discriminator"),
            "restored_from": self._restored_from,
            "components": registered_components(self.cfg),
            "built": tuple(name for name in CONFIGURED if getattr(self, name, None) is not None),
        }

    @classmethod
    def _rebuilt(cls, recipe: dict[str, Any], has_weights: bool) -> "Self":
        for name, component in recipe["components"].items():
            register_component(component, name=name)
        with building_state(torch.device("cpu")):
            parts = None
            if not has_weights:
                with on_meta_device():
                    parts = build_parts(checked_values(recipe["cfg"]))
            read_parts = READ_PARTS.set(parts)
            cls._set_model_restore_state(is_being_restored=True)  # prevents NeMo from opening the training data
            try:
                model = cls(cfg=recipe["cfg"])
            finally:
                cls._set_model_restore_state(is_being_restored=False)
                READ_PARTS.reset(read_parts)
            if not recipe["has_discriminator"]:
                del model.discriminator
            model._restored_from = recipe["restored_from"]
            training = cast(Any, model)
            if "discriminator" in recipe["built"]:
                training.build_discriminator()
            if "_losses" in recipe["built"]:
                _ = training.losses
            if "_metrics" in recipe["built"]:
                _ = training.metrics
        return model
