"""Sharing a model out over ranks: who has which part of it (integers), and what they say to each other (tensors)."""
