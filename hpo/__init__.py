"""Many training runs: studies of LSTM classifiers shared by many workers."""
