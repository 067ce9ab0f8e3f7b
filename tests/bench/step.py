"""python tests/bench/step.py: one training step against TRL's, on the same model, pairs, batch and precision.

Needs `pip install '.[bench]'`. Runs ours and TRL's step in turn, in one process, and prints for each method
the median of the ratios of their times, the tokens per second, and loss and gradient norm of both, which
have to agree. Peak memory is measured in a fresh process for each (ru_maxrss less that before the first
step; on CUDA the allocator's).
"""
