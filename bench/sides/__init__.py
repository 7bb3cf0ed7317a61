"""The engines that are compared, each in a child process of its own interpreter.

A child reads one JSON object per line and answers each with one: `load`, `decode`, `prefill`, `logits` (see `calls`).
A child's module imports its own engine and the standard library only, because it runs in that engine's environment.
"""
