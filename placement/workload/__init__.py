"""What is asked of a cluster: traces, length and arrival distributions, streams of requests."""
