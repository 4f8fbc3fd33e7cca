"""The runner for a GPU: static steps in CUDA graphs, kernels of our own."""
