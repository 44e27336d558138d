"""What `bench`, `evaluation` and `calibrate` share, and nothing that serves."""
