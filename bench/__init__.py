"""Measures of the engine; nothing else imports this package."""
