"""Workloads: traces, distributions of lengths and arrivals, streams of requests."""
