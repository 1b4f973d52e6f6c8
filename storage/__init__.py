"""What Postgres and the artifact store remember: trials, leases, artifacts, promoted models."""
