"""Every op in plain PyTorch, tuned for CPUs, under the names and signatures of `llama.kernels.ops`."""
