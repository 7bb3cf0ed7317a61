"""The embedded fleet: etcd, schedulers, workers and gateways as processes of this machine, on loopback.

`options` says what is wanted, `plan` turns it into command lines, `member` runs one process, `supervisor` runs them
all, `state` is the file by which other commands find them, `shutdown` ends a fleet from outside.
"""
