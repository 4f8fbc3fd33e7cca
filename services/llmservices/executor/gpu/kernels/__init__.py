"""Triton kernels.  Imported only where they run: Triton comes with torch's CUDA builds alone.

Each launch says `enable_fp_fusion`: what Triton does by itself changes with its version, and where
nothing is said it warns.
"""
