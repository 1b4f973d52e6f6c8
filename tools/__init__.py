"""Set-up of a checkout, and the image built and run for real."""
