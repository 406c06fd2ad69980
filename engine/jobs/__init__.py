"""What the jobs share: how models are opened, and the check before the work."""
