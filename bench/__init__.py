"""Reproducible comparisons, one command each."""
