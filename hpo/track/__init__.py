"""Trials that have ended as runs in MLflow and TensorBoard, one each, whoever writes it."""
