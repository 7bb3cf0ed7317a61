"""A fleet in virtual time: an engine model fitted to the real engine, and the scheduler or a rival's rule before it."""
