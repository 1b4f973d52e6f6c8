"""One trial, from its parameters to its outcome."""
