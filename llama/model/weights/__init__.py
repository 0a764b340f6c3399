"""The forms that a weight may lie in, each with its own matmul."""
