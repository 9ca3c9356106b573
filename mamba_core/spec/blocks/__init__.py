"""Kinds of layers that several architectures have, a file each: sizes, parameters, state and nodes."""
