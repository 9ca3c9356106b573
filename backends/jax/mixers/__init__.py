"""Mixers and feed-forwards: a file exports `Mixer`, and the file's name is its kind."""
