"""Decoder layers of our own in the place of transformers': flat batches through few autograd functions."""
