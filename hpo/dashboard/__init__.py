"""optuna-dashboard over the studies, guarded."""
