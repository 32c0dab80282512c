"""What is known of a run, as one page for people."""
