"""Every op as Triton kernels, under the names and signatures of `llama.kernels.ops`."""
