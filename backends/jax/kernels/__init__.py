"""Fused kernels, each beside the plain op that it must equal."""
