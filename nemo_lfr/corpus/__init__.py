"""Conversion of audio corpora to token corpora, shard by shard, and back."""
