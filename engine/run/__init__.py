"""A run: its set-up, its phases, its folder and its result."""
