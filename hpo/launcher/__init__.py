"""Starts workers here or on a Ray cluster and waits for a study to end."""
