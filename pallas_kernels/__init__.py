"""Matrix products for Hopper GPUs on raw arrays, each beside its meaning in plain jax.numpy (`reference`).

`compat` holds what is unstable in Pallas, `order` the permutations of stored codes, `shapes` what tests and benchmarks
share. No rule of `jquant.matmul` calls a kernel yet.
"""
