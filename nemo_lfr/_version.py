"""The version of the package, which files, reports and the command line state."""

__version__ = "0.1.0"
