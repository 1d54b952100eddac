"""Pallas kernels on raw arrays, each beside its meaning in plain jax.numpy; they come with issue 6."""
