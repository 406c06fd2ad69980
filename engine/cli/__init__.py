"""The `lethe` command: one file a command."""
