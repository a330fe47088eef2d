"""Training, plans, and the runs that are recorded."""
