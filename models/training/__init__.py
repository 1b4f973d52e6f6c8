"""One trial's training: batches, members, optimisers, memory."""
