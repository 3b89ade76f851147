"""Methods of `Codec` that load from and save to the Hugging Face Hub.

The methods have the same names as those of `huggingface_hub.ModelHubMixin`. `Codec` does not inherit from this mixin,
because the mixin takes a second to import and changes the arguments of the constructor. Only `push_to_hub` uses it.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nemo_lfr.codec.arrays import Array
from nemo_lfr.codec.backends import open_backend
from nemo_lfr.codec.base import CodecBase
from nemo_lfr.errors import CheckpointError, NemoLfrError, shorten
from nemo_lfr.io.locate import MODEL_SUFFIXES, PREPROCESSOR, SAFETENSORS, SAFETENSORS_CONFIG, check_path, resolve

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
            pretrained_model_name_or_path: name of a repository on the Hub, or path of a local folder or file. The
                repository contains `config.json` and `model.safetensors`, or a single `.nemo` file. See `source` in
                `nemo_lfr.load` for local paths.
            device: as in `nemo_lfr.load`.
            precision: as in `nemo_lfr.load`.
            force_download: download again, even if the files are in the cache.
            revision: branch, tag or commit of the repository.
            download: other arguments of `huggingface_hub.snapshot_download`, such as `token`, `cache_dir` and
                `local_files_only`.

        Raises:
            CheckpointError: if the checkpoint cannot be found, downloaded or read.
        """
        check_path(pretrained_model_name_or_path, CheckpointError)
        source = os.path.expanduser(pretrained_model_name_or_path)
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
            push_to_hub_kwargs: arguments of `push_to_hub`.

        Returns:
            URL of the commit if `push_to_hub` is set, else None.

        Raises:
            NemoLfrError: if the codec has no config, because it was built from modules or its backend is not PyTorch;
                or if it has hooks, replaced layers or changed settings, which would not be saved.
        """
        from nemo_lfr.checkpoint.folder import module_tensors, write_folder
        from nemo_lfr.modules.altered import SAVE

        config = getattr(self.backend, "config", None)
        if config is None:
            raise NemoLfrError(
                f"{self.name}: the codec has no config to save; load it from a checkpoint with PyTorch."
            )
        self.backend.load("encode")
        self.backend.load("decode")
        backend = cast(Any, self.backend)
        backend.check_unaltered(SAVE)
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
                `commit_message` and `branch`.

        Returns:
            URL of the commit.

        Raises:
            NemoLfrError: as in `save_pretrained`.
        """
        from huggingface_hub import ModelHubMixin

        codec = self
        size = f"{self.frame_rate:.2f} frames per second, {self.num_codebooks} x {self.codebook_size} tokens"

        class Upload(ModelHubMixin):
            """Adapter that uploads the codec with the mixin's `push_to_hub`."""

            def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
                codec.save_pretrained(save_directory)
                text = CARD.format(description=size, repo_id=repo_id)
                Path(save_directory, "README.md").write_text(text, encoding="utf-8")

        url: str = Upload().push_to_hub(repo_id, **kwargs)
        return url


def _snapshot(repository: str, download: dict[str, Any]) -> str:
    """Download a codec from the Hub, with options for `snapshot_download`, and return the folder of its files."""
    from huggingface_hub import snapshot_download

    if os.path.splitext(repository)[1].lower() in MODEL_SUFFIXES:
        raise CheckpointError(f"{shorten(repository, 300)}: no such file.")
    names = [SAFETENSORS_CONFIG, SAFETENSORS, PREPROCESSOR, "*.nemo"]
    try:
        path: str = snapshot_download(repository, allow_patterns=names, **download)
    except Exception as error:  # the Hub client's transport (requests, httpx, ...) depends on its version
        reason = shorten(str(error).partition("\n")[0] or type(error).__name__, 200)
        raise CheckpointError(
            f"{shorten(repository, 300)}: could not be downloaded from the Hub ({reason}); check the name, the "
            "revision and the network connection."
        ) from error
    return path
