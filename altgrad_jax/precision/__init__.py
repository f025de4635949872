"""What a number is, and where it is rounded. Depends on jax and numpy alone."""
