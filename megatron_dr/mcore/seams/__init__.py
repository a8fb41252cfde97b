"""What a feature of training is, and what a run is given."""
