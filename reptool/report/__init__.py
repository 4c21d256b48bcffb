"""What was done, as records and in words."""
