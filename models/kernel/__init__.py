"""LSTM layers on a CPU through a kernel in C, compiled for the machine at first use."""
