"""How far a way to compute a model is from fp32: a text, a distance, and the search for a plan of precisions."""
