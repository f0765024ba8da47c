"""Evaluation of runs: steady state, attainment, goodput and the summary for people."""
