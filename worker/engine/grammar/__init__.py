"""Constrained output: which tokens may come next, so that every answer has the form that was asked for.

`vocabulary` compiles a constraint with llguidance, `checker` is the process that tries it first and can be killed,
`guard` talks to that process, `matcher` follows one choice, `grammars` brings them together for the engine.
"""
