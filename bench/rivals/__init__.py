"""Routing rules of other systems, from their papers and documentation: where a new request goes, at once."""
