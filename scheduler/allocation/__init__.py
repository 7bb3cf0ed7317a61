"""Who may hold what: promises to models and jobs, kept by loading, moving and unloading. Pure but for `intent.py`.

One page of reasons: docs/decisions/0014-the-ledger.md. `holdings` accounts, `replicas` says how many, `control` decides
what moves, `leaving` empties what goes, `shares` keeps KV blocks for those they are promised to.
"""
