"""Sequences from files and arrays, their splits, and the one canonical file."""
