"""What requests may hold, by dialect."""
