"""Time of training and unlearning steps, and of reading data."""
