"""What a step costs on which device: hardware, models, efficiencies, calibrations."""
