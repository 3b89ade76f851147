"""How the codec inside the package was trained; README.md has the commands."""
