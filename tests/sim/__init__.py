"""Deterministic simulation: the real services on one virtual clock, against models of etcd and of the network.

`python -m tests.sim --seeds 2000` runs schedules of faults, `python -m tests.sim --mutants` shows that seeded bugs are
found. How it is put together: docs/decisions/0015-deterministic-simulation.md.
"""
