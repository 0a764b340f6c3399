"""Every op in plain PyTorch, tuned for CPUs, under the names and signatures of `llama.kernels.ops`."""

if __name__ != "llama.kernels.cpu":
    raise ImportError("the kernels are imported as llama.kernels: under a second name they would be compiled twice")
