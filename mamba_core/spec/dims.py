"""The letters that name dimensions, in code, docstrings and shape annotations.

    b  batch                     e  d_inner = expand * d_model (channels of the recurrence)
    l  length (time)             n  d_state (states per channel)
    d  d_model                   r  dt_rank (rank of the step-size projection)
    v  vocabulary (padded)       k  d_conv (width of the short convolution)
    o  outputs of a head         i  inputs of a projection

Of architectures with heads: h heads, p head dimension, g groups. Of mixtures: x experts. Of images: c channels, i and j
rows and columns of a patch, m classes.
Arrays are laid out (batch, length, channels) everywhere.
"""

LETTERS = {
    "b": "batch",
    "l": "length",
    "d": "d_model",
    "e": "d_inner",
    "n": "d_state",
    "r": "dt_rank",
    "v": "vocabulary",
    "k": "d_conv",
    "h": "heads",
    "p": "head_dim",
    "g": "groups",
    "x": "experts",
    "o": "outputs of a head",
    "i": "inputs of a projection, or rows of a patch",
    "c": "channels of an image",
    "j": "columns of a patch",
    "m": "classes",
}
