"""The general path on CUDA: transformers' own modules over paged attention of ours, replayed from graphs.

What imports Triton is imported only where a model computes on CUDA: torch brings it along there.
"""
