"""Every op as Triton kernels, under the names and signatures of `llama.kernels.ops`."""

try:
    import triton  # noqa: F401
except ModuleNotFoundError:
    message = "the kernels of a GPU need Triton: pip install 'llama-engine[triton]'"
    raise ModuleNotFoundError(message, name="triton") from None

if __name__ != "llama.kernels.gpu":
    raise ImportError("the kernels are imported as llama.kernels: under a second name they would be compiled twice")
