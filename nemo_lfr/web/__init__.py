"""The page in the browser: its files are in `page/`, for `nemo-lfr serve` and for static sites."""

from pathlib import Path

PAGE = Path(__file__).parent / "page"
INDEX, FOLDER = "index.html", "page"  # a site has the index, and the other files in this folder
EXAMPLE = "example.flac"  # in the folder of a site: the bundled recording
EXAMPLE_PATH = Path(__file__).parents[1] / "weights" / "speech.flac"
