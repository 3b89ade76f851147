"""Version of the package, as recorded in files and reports."""

__version__ = "0.1.0"
