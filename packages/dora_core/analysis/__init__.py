"""What training did to weights: magnitude and direction changes between checkpoints (paper, section 3.2)."""
