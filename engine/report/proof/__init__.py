"""The section of a report that sets out the evidence."""
