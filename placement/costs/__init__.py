"""Step costs by device: hardware, models, efficiencies, calibrations."""
