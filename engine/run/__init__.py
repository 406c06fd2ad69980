"""A run: set up, and what it gives back."""
