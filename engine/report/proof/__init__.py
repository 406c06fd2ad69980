"""Section of a report that shows the evidence of a verdict."""
