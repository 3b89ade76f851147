"""Training recipe of the bundled codec; README.md lists the commands."""
