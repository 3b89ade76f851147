"""Methods of `Codec` that load from and save to the Hugging Face Hub, with the names of `ModelHubMixin`.

The mixin itself is composed, not inherited: it takes a second to import and rewrites the constructor's arguments.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lfr.codec.arrays import Array
from nemo_lfr.codec.backends import open_backend
from nemo_lfr.codec.base import CodecBase
from nemo_lfr.errors import CheckpointError, NemoLfrError, shorten
from nemo_lfr.io.locate import MODEL_SUFFIXES, PREPROCESSOR, SAFETENSORS, SAFETENSORS_CONFIG

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
    """`from_pretrained`, `save_pretrained` and `push_to_hub`."""

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
            pretrained_model_name_or_path: as `source` in `nemo_lfr.load`: a repository with `config.json` and
                `model.safetensors`, or with one `.nemo`, or the path of a folder or file.
            device: as in `nemo_lfr.load`.
            precision: as in `nemo_lfr.load`.
            force_download: download again, even if the files are in the cache.
            revision: branch, tag or commit.
            download: further arguments of `huggingface_hub.snapshot_download`, such as `token`, `cache_dir` and
                `local_files_only`.

        Raises:
            CheckpointError: if the checkpoint cannot be found, downloaded or read.
        """
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

        `nemo_lfr.load`, `Codec.from_pretrained` and `AutoModel.from_pretrained` open the folder, with the same tokens.

        Args:
            save_directory: created if it does not exist; existing files are replaced.
            push_to_hub: also upload the folder.
            repo_id: repository to upload to; default: the folder's name.
            push_to_hub_kwargs: arguments of `push_to_hub`.

        Returns:
            Address of the commit with `push_to_hub`, else None.

        Raises:
            NemoLfrError: if the codec has no config, because it was made of modules or runs on another backend.
        """
        from nemo_lfr.checkpoint.folder import module_tensors, write_folder

        config = getattr(self.backend, "config", None)
        if config is None:
            raise NemoLfrError(f"{self.name}: has no config to save; load it from a checkpoint with PyTorch.")
        self.backend.load("encode")
        self.backend.load("decode")
        modules = {"audio_encoder": self.encoder, "vector_quantizer": self.quantizer, "audio_decoder": self.decoder}
        write_folder(save_directory, config, module_tensors(config, modules, self.name), overwrite=True)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or Path(save_directory).resolve().name, **push_to_hub_kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the codec to a repository of the Hub, which is created if it does not exist.

        Args:
            repo_id: such as "user/codec".
            kwargs: arguments of `huggingface_hub.ModelHubMixin.push_to_hub`, such as `private`, `token`,
                `commit_message` and `branch`.

        Returns:
            Address of the commit.

        Raises:
            NemoLfrError: as `save_pretrained`.
        """
        from huggingface_hub import ModelHubMixin

        codec = self
        size = f"{self.frame_rate:.2f} frames per second, {self.num_codebooks} x {self.codebook_size} tokens"

        class Upload(ModelHubMixin):
            """Codec with the methods of the mixin."""

            def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
                codec.save_pretrained(save_directory)
                text = CARD.format(description=size, repo_id=repo_id)
                Path(save_directory, "README.md").write_text(text, encoding="utf-8")

        url: str = Upload().push_to_hub(repo_id, **kwargs)
        return url


def _snapshot(repository: str, download: dict[str, Any]) -> str:
    """Download the files of a codec, with options that `nemo_lfr.load` does not have."""
    from huggingface_hub import snapshot_download

    if os.path.splitext(repository)[1].lower() in MODEL_SUFFIXES:
        raise CheckpointError(f"{shorten(repository, 300)}: no such file.")
    names = [SAFETENSORS_CONFIG, SAFETENSORS, PREPROCESSOR, "*.nemo"]
    try:
        path: str = snapshot_download(repository, allow_patterns=names, **download)
    except Exception as error:  # the Hub client's transport (requests, httpx, ...) depends on its version
        reason = shorten(str(error).partition("\n")[0] or type(error).__name__, 200)
        raise CheckpointError(
            f"{shorten(repository, 300)}: could not be downloaded from the Hub ({reason})."
        ) from error
    return path
