"""Web page that encodes and decodes, for `nemo-lfr serve` and for static sites. Its files are in `page/`."""

from pathlib import Path

PAGE = Path(__file__).parent / "page"
INDEX, FOLDER = "index.html", "page"  # a site consists of the index and this folder with all other files
EXAMPLE = "example.flac"  # name of the bundled recording in this folder
EXAMPLE_PATH = Path(__file__).parents[1] / "weights" / "speech.flac"
