"""Recipes that trained the weights in this package."""
