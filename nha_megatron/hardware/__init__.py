"""What chips and networks can do, as numbers. Without torch."""
