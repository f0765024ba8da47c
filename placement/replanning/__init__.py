"""Whether a running cluster still fits its traffic, and what another plan would gain."""
