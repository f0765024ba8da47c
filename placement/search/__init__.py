"""The best plan for an SLO file."""
