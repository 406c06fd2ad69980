"""The `lethe` command; `app` gathers its commands."""
