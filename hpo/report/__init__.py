"""What a study was asked, what it found and how sure that is, as one HTML file that needs nothing else."""
