"""How XLA is asked to compile the programs that run a model."""

# A layer's kernels lie in a stack of all layers' [N, in, out]. cuBLAS takes its part of the stack where it lies (from JAX 0.11 on); for a
# product by Triton, XLA for GPUs first copies it out, so that a decoded token moves all weights three times. Compilers for other devices
# let the option be.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
