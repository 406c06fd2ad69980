"""Runs that are interrupted, and runs on two hosts."""
