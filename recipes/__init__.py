"""Recipes that produced the weights shipped with this package."""
