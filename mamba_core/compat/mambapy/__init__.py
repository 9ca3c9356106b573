"""mambapy's modules over ours, under the same names; see the table in mamba_core/compat/README.md."""
