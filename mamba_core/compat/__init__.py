"""Other packages' names over ours: a user of theirs changes the import alone. README.md has the table of names.

`minimamba` and `mambapy` need PyTorch. `import mamba_core` imports neither.
"""
