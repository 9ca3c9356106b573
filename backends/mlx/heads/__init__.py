"""The models of the tasks, a file each, which exports `Model`: see `mamba_core.backend.Backend.build`."""
