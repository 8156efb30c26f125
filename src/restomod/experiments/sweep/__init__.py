"""Many runs with varied settings."""
