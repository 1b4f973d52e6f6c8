"""The saved model: its folder, its model card, its exports."""
