"""Kills of `mamba-core convert` and `mamba-core train`: at random times, and at system calls by strace."""
