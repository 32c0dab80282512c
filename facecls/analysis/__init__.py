"""What is said about predictions."""
