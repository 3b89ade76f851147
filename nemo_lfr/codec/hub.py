"""Methods of `Codec` that load from and save to the Hugging Face Hub.

The methods have the same names as those of `huggingface_hub.ModelHubMixin`, and accept most of their arguments; other
arguments are refused. `Codec` does not inherit from this mixin, because importing the mixin takes a second, and the
mixin changes the arguments of the constructor.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nemo_lfr.codec.arrays import Array
from nemo_lfr.codec.backends import open_backend
from nemo_lfr.codec.base import CodecBase
from nemo_lfr.errors import CheckpointError, NemoLfrError, first_line, shorten
from nemo_lfr.io.hub import ALIASES, checkpoint_in
from nemo_lfr.io.locate import FOLDERS, MODEL_SUFFIXES, PREPROCESSOR, SHARDS, check_path, resolve

if TYPE_CHECKING:
    from typing_extensions import Self

CARD = """---
library_name: nemo-lfr
tags: [audio, speech, codec, model_hub_mixin]
---

Low Frame-rate Speech Codec, {description}.

    import nemo_lfr

    codec = nemo_lfr.Codec.from_pretrained("{repo_id}")
    tokens, tokens_len = codec.encode("speech.wav")
"""


# Arguments of the Hub client that these methods set themselves.
SET_HERE = ("repo_id", "repo_type", "allow_patterns", "dry_run")
WRITTEN_HERE = ("self", "repo_id", "config", "model_card_kwargs")


class HubMethods(CodecBase[Array]):
    """Base class of `Codec` with `from_pretrained`, `save_pretrained` and `push_to_hub`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        device: Any = None,
        precision: str = "fp32",
        force_download: bool = False,
        revision: str | None = None,
        **download: Any,
    ) -> "Self":
        """Load a codec from a Hub repository or a local path.

        Args:
            pretrained_model_name_or_path: name of a repository on the Hub, or path of a local folder or file. A
                repository must contain `config.json` and `model.safetensors`, or a `.nemo` file. See `source` in
                `nemo_lfr.load` for local paths.
            device: as in `nemo_lfr.load`.
            precision: as in `nemo_lfr.load`.
            force_download: download again, even if the files are in the cache.
            revision: branch, tag or commit of the repository.
            download: other arguments of `huggingface_hub.snapshot_download`, such as `token`, `cache_dir` and
                `local_files_only`.

        Raises:
            CheckpointError: if the checkpoint cannot be found, downloaded or read.
            NemoLfrError: as in `nemo_lfr.load`, or for an unknown argument.
        """
        if download:  # the import takes a second
            from huggingface_hub import snapshot_download

            _check_names(download, "from_pretrained", snapshot_download, SET_HERE)
        check_path(pretrained_model_name_or_path, CheckpointError)
        source: str | Path = os.path.expanduser(pretrained_model_name_or_path)
        download = {"force_download": force_download, "revision": revision, **download}
        if any(value not in (None, False) for value in download.values()) and not os.path.exists(source):
            source = _snapshot(os.fspath(pretrained_model_name_or_path), download)
        return cls(open_backend(source, device, precision))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the codec as `config.json`, `model.safetensors` and `preprocessor_config.json`.

        `nemo_lfr.load`, `Codec.from_pretrained` and transformers' `AutoModel.from_pretrained` can open the folder. The
        loaded codec gives the same tokens.

        Args:
            save_directory: folder to write to. It is created if it does not exist; existing files are replaced.
            push_to_hub: also upload the codec to the Hub.
            repo_id: repository to upload to; default: the folder's name.
            push_to_hub_kwargs: arguments of `push_to_hub`. They have no effect unless `push_to_hub` is set.

        Returns:
            URL of the commit if `push_to_hub` is set, else None.

        Raises:
            NemoLfrError: for an unknown argument. Also if the codec has no config (it was built from modules, or its
                backend is not PyTorch), or if it has changes that would not be saved, such as hooks, replaced layers,
                or weights in another dtype than fp32.
        """
        from nemo_lfr.checkpoint.folder import module_tensors, write_folder
        from nemo_lfr.modules.altered import SAVE

        _check_upload(push_to_hub_kwargs, "save_pretrained")
        config = getattr(self.backend, "config", None)
        if config is None:
            raise NemoLfrError(
                f"{self.name}: the codec has no config to save; load it from a checkpoint with PyTorch."
            )
        self.backend.load("encode")
        self.backend.load("decode")
        backend = cast(Any, self.backend)
        backend.check_unaltered(SAVE)
        backend.check_weights()
        modules = {"audio_encoder": self.encoder, "vector_quantizer": self.quantizer, "audio_decoder": self.decoder}
        tensors = module_tensors(config, modules, self.name)
        backend.check_described(SAVE)
        write_folder(save_directory, config, tensors, overwrite=True)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or resolve(save_directory).name, **push_to_hub_kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the codec to a repository on the Hub, which is created if it does not exist.

        Args:
            repo_id: name of the repository, such as "user/codec".
            kwargs: arguments of `huggingface_hub.ModelHubMixin.push_to_hub`, such as `private`, `token`,
                `commit_message` and `branch`. The codec writes its own config and model card, so `config` and
                `model_card_kwargs` are refused.

        Returns:
            URL of the commit.

        Raises:
            NemoLfrError: as in `save_pretrained`, or if an argument is refused or unknown.
        """
        from huggingface_hub import ModelHubMixin

        _check_upload(kwargs, "push_to_hub")
        codec = self
        size = f"{self.frame_rate:.2f} frames per second, {self.num_codebooks} x {self.codebook_size} tokens"

        class Upload(ModelHubMixin):
            """Adapter that uploads the codec with `ModelHubMixin.push_to_hub`."""

            def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
                codec.save_pretrained(save_directory)
                text = CARD.format(description=size, repo_id=repo_id)
                Path(save_directory, "README.md").write_text(text, encoding="utf-8")

        url: str = Upload().push_to_hub(repo_id, **kwargs)
        return url


def _check_upload(arguments: Mapping[str, Any], method: str) -> None:
    """Raise NemoLfrError for unknown arguments of an upload.

    `config` and `model_card_kwargs` must be None, because this package writes the config and the model card itself.
    """
    if given := {name: value for name, value in arguments.items() if value is not None or name not in WRITTEN_HERE}:
        from huggingface_hub import ModelHubMixin

        _check_names(given, method, ModelHubMixin.push_to_hub, WRITTEN_HERE)


def _check_names(arguments: Mapping[str, Any], method: str, function: Callable[..., Any], without: Any) -> None:
    """Check that the Hub client knows all arguments, because it may ignore misspelled names.

    Args:
        arguments: arguments by name.
        method: name of the method that got the arguments, for the message.
        function: function of the Hub client that takes these arguments.
        without: names of parameters of `function` that callers may not pass.

    Raises:
        NemoLfrError: for the first unknown name.
    """
    known = [name for name in inspect.signature(function).parameters if name not in without]
    for name in arguments:
        if name not in known:
            raise NemoLfrError(
                f"{method} got the argument {shorten(name)}, which has no effect on a codec; leave it out. "
                f"Arguments for the Hub are {', '.join(known)}."
            )


def _snapshot(name: str, download: dict[str, Any]) -> Path:
    """Download a codec from the Hub, with options for `snapshot_download`, and return the path of the checkpoint."""
    from huggingface_hub import snapshot_download

    if os.path.splitext(name)[1].lower() in MODEL_SUFFIXES:
        raise CheckpointError(f"{shorten(name, 300)}: no such file.")
    repository = ALIASES.get(name, name)
    files = {file for pair in FOLDERS for file in pair}
    try:
        folder = snapshot_download(
            repository, allow_patterns=[*sorted(files), SHARDS, PREPROCESSOR, "*.nemo"], **download
        )
    except Exception as error:  # the Hub client's transport (requests, httpx, ...) depends on its version
        reason = shorten(first_line(error), 200)
        raise CheckpointError(
            f"{shorten(repository, 300)}: could not be downloaded from the Hub ({reason}); check the name, the "
            "revision and the network connection."
        ) from error
    return checkpoint_in(Path(folder), repository)
