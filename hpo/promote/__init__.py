"""From the best trial to a model version, and a finished trial trained again."""
