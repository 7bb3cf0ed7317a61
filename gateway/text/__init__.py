"""Text lives here: templates, tokens, stop strings, prefix hashes. Pure: values in, values out."""
