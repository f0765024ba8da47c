"""From an SLO, a workload and a cluster to a plan: hardware, calibration, simulator, search, report."""
