"""Files that a `.nemo` file contains besides the config and the weights. NeMo calls them artifacts."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_lfr.checkpoint.archive import is_plain_name, unpack_files
from nemo_lfr.checkpoint.interpolations import strings
from nemo_lfr.errors import ConfigError, quoted
from nemo_lfr.nemo.base import AppState, BaseModel

_PREFIX = "nemo:"  # NeMo writes this prefix and the name of a packed file into the config


class PackedFiles(BaseModel):
    """Mixin that registers the files of a subclass."""

    def register_artifact(self, config_path: str, src: Any, verify_src_exists: bool = True) -> Any:
        """Register a file that `save_to` packs into the `.nemo`. Call this method in a constructor.

        Args:
            config_path: key in the config to which `save_to` writes the name of the packed file.
            src: path of the file, or the value that `save_to` wrote. The file is not registered if `src` is None or
                empty.
            verify_src_exists: whether a path without a file is an error.

        Returns:
            The absolute path of the file, or `src` itself if it is None or empty. A file from a checkpoint exists
            only until the constructor returns.

        Raises:
            ConfigError: if `src` names a packed file, but the checkpoint has no such file.
        """
        if isinstance(src, str) and src.startswith(_PREFIX):
            name, folder = src.removeprefix(_PREFIX), AppState().nemo_file_folder
            if folder is None or not is_plain_name(name) or not os.path.isfile(os.path.join(folder, name)):
                raise ConfigError(
                    f"{config_path} is {quoted(src)}, but no checkpoint with such a file is being restored; "
                    f"set {config_path} to the path of a file."
                )
        return super().register_artifact(config_path, src, verify_src_exists)

    def check_files_exist(self) -> None:
        """Check that the registered files exist, so that the constructor of a subclass can read them again.

        Raises:
            ConfigError: if a file does not exist, for example because it was packed into the checkpoint.
        """
        for key in getattr(self, "artifacts", None) or {}:
            path = OmegaConf.select(self.cfg, key)
            if isinstance(path, str) and path and not os.path.exists(path):
                raise ConfigError(
                    f"this {type(self).__name__} cannot be pickled, because the file of {key} does not exist (a file "
                    "in a checkpoint is unpacked only while restore_from runs); use save_to and restore_from instead, "
                    f"or set model.cfg.{key} to the path of a copy of the file."
                )


@contextlib.contextmanager
def restoring(model_class: type[BaseModel], path: Path, config: DictConfig) -> Iterator[None]:
    """Tell NeMo's constructors inside a `with` block that a model is being restored.

    Inside the block, `register_artifact` finds the packed files that the config names, and NeMo's constructor does not
    open training, validation or test data.

    Args:
        model_class: class of the model.
        path: checkpoint to restore.
        config: model config.

    Raises:
        CheckpointError: if the checkpoint is damaged.
    """
    values = strings(OmegaConf.to_container(config, resolve=False))
    names = [value.removeprefix(_PREFIX) for value in values if value.startswith(_PREFIX)]
    with contextlib.ExitStack() as stack:
        folder = None
        if path.is_dir():
            folder = str(path)
        elif names:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            unpack_files(path, names, Path(folder))
        AppState().model_restore_path = str(path)  # `save_to` packs the files of this checkpoint again
        model_class._set_model_restore_state(is_being_restored=True, folder=folder)
        try:
            yield
        finally:
            model_class._set_model_restore_state(is_being_restored=False)
