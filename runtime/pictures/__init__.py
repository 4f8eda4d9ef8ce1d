"""Pictures: what the user gives, as what the encoders see."""
