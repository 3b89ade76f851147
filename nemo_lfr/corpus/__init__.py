"""A corpus of audio to a corpus of tokens, shard by shard, and back."""
