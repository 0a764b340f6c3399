"""The forms of a weight: `form` says what a form does, each of the others is one kind, with its own matmul."""
