"""Recipe that trains the bundled codec. README.md lists the commands."""
