"""Quantization of large language models in JAX and Flax."""
