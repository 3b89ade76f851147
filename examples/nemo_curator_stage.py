"""NeMo Curator stage that encodes the audio file of each task.

    from nemo_curator.pipeline import Pipeline
    from nemo_curator.stages.audio.common import ManifestReader

    pipeline = Pipeline(name="tokens", stages=[ManifestReader("manifest.jsonl"), TokenizeStage("tokens/")])
    pipeline.run()

The stage adds the path of a `.lfr` token file to the data of each task. `nemo-lfr decode` decodes these files. Tested
with Curator 1.4. To tokenize a corpus without other stages, use `nemo-lfr tokenize`, which resumes interrupted runs
and writes shards.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import AudioTask

from nemo_lfr import load
from nemo_lfr.errors import NemoLfrError
from nemo_lfr.frames import num_frames


@dataclass
class TokenizeStage(ProcessingStage[AudioTask, AudioTask]):
    """Tokenize the audio file of each task.

    Args:
        out: folder for the token files; all machines need access to it.
        model: checkpoint or Hub id of the codec; None for the bundled codec.
        device: device of the codec; None for a GPU if the worker has one, else the CPU.
        audio_filepath_key: key of the path of the audio file.
        tokens_key: key for the path of the token file.
        frames_key: key for the number of frames.
        error_key: key for the error message if a file cannot be tokenized; the task then has no tokens.
    """

    out: str
    model: str | None = None
    device: str | None = None
    audio_filepath_key: str = "audio_filepath"
    tokens_key: str = "tokens_filepath"
    frames_key: str = "num_frames"
    error_key: str = "tokens_error"
    name: str = "nemo_lfr_tokenize"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))

    def inputs(self) -> tuple[list[str], list[str]]:
        """Return the keys that a task must have."""
        return [], [self.audio_filepath_key]

    def outputs(self) -> tuple[list[str], list[str]]:
        """Return the keys that the stage adds to a task if its file can be tokenized."""
        return [], [self.tokens_key, self.frames_key]

    def setup(self, worker_metadata: Any = None) -> None:
        """Load the codec, once in each worker."""
        self._codec = load(self.model, self.device)

    def process(self, task: AudioTask) -> AudioTask:
        """Tokenize the file of a task."""
        audio = task.data[self.audio_filepath_key]
        # The hash distinguishes files with the same name in different folders
        name = f"{Path(audio).stem}-{hashlib.sha256(str(audio).encode()).hexdigest()[:16]}.lfr"
        path = Path(self.out) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            num_samples = self._codec.encode_file(audio, path, overwrite=True)
        except (NemoLfrError, OSError) as error:
            task.data[self.error_key] = str(error)
            return task
        task.data[self.tokens_key] = str(path)
        task.data[self.frames_key] = num_frames(num_samples, self._codec.samples_per_frame)
        return task
