"""Triton kernels.  Imported only where they run: Triton comes with torch's CUDA builds alone."""
