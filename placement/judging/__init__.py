"""What came of a run: steady state, attainment, goodput, and the summary that people read."""
