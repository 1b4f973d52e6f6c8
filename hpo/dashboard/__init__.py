"""optuna-dashboard for our studies, with access control."""
