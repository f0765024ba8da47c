"""Whether the running plan still fits its workload, and the gain of a new plan."""
