"""Tokenize audio corpora shard by shard, read the tokens, and decode them to audio."""
