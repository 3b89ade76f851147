"""How the bundled codec was trained; README.md has the commands."""
