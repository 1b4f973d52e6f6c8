"""One worker process: what it serves, its slots, its signals."""
