"""Services that misbehave on command: the real ones with one piece replaced."""
