"""Recipes: how weights that ship with this package were made."""
