"""One training run: data, the LSTM classifier, its training, metrics, the saved bundle, exports."""
